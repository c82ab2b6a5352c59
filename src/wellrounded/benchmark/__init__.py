"""How fast it is here: single layers by shape and rows, whole models by token, next to their dense counterparts."""
