"""The numbers: grids, Hessians and the solver. Only torch and the standard library below this line."""
