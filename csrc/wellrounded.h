/* The native core of wellrounded: a plain C interface, no torch, no Python.
 *
 * A layer is one block of memory, made by wr_pack and moved around freely: a Header, then scales, zeros, columns and
 * codes at the offsets it names. Outputs are kept in tiles of 16, inputs in units that fill whole 64-byte vectors:
 *
 *   codes    [tiles][groups][units per group][planes][32 words of 16 bits]
 *   scales   [tiles][groups][16] float16
 *   zeros    [tiles][groups][16] int8, zero point minus 2^(bits-1); absent if it is 0 everywhere
 *   columns  [padded inputs] int32, the input that stands at each place, -1 for padding; absent if they are in order
 *
 * Word 2 n + p of a plane holds the codes of output n for the inputs 2 j + p, j counting up from the lowest bits:
 * shifting the vector right by j codes brings the pair (2 j, 2 j + 1) of every output to the bottom of its words.
 *
 *   bits   planes of a unit                        inputs in a unit
 *   2      one of 2-bit codes                      16
 *   3      two of the low 2 bits, one of the top   32
 *   4      one of 4-bit codes                      8
 *   8      one of the top 4 bits, one of the low   8
 */
#ifndef WELLROUNDED_H
#define WELLROUNDED_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define WR_API __declspec(dllexport)
#else
#define WR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { WR_FLOAT32 = 0, WR_BFLOAT16 = 1 };                      /* dtypes of activations and dense weights */
/* Instruction sets. Levels count up within an architecture, later ones faster; WR_PORTABLE is everywhere. */
enum { WR_PORTABLE = 0, WR_AVX2 = 1, WR_AVX512_BF16 = 2 /* x86-64 */, WR_NEON = 1 /* AArch64 */ };
enum { WR_MAGIC = 0x57523031, WR_ALIGNMENT = 64, WR_TILE = 16 };

typedef struct {
    int64_t magic, bytes;           /* of the whole block, this header included */
    int64_t outputs, inputs;
    int64_t bits, groups, width;    /* inputs per group, padded to whole units */
    int64_t scales, zeros, columns, codes; /* offsets from the header; 0 for what is absent */
    int64_t reserved[5];
} wr_header;

/* Changes whenever a function or the layout of a block does: a caller written for another number must not go on. One
 * that is new changes nothing for those who do not know it. */
enum { WR_ABI = 4 };
WR_API int wr_abi(void);

/* The best instruction set of this machine, and the one in use: at most `level` after wr_use. */
WR_API int wr_best(void);
WR_API int wr_use(int level);
/* What a level of this machine is called, null if it has no such level. */
WR_API const char *wr_name(int level);

/* The OpenMP runtime whose threads to borrow: its GOMP_parallel, omp_get_thread_num and omp_get_max_threads.
 * Without them everything runs on the calling thread. */
WR_API void wr_threads(void *parallel, void *thread_number, void *most);

/* Bytes of a packed layer, 0 if no layer can have these numbers. `width` is the largest number of inputs in a group. */
WR_API int64_t wr_bytes(int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width, int has_zeros,
                 int has_columns);

/* Asks for pages of 2 MB for memory that nothing was written to yet, where an operating system can be asked: reading
 * through pages of 4 kB waits for their addresses, a quarter of the time. */
WR_API void wr_large_pages(void *memory, int64_t bytes);

/* Packs codes [outputs][inputs], scales [outputs][groups] float16, zeros [outputs][groups] (or null: all 2^(bits-1))
 * and the group of each input, ascending within a group; `group` null means inputs in order, `width` to a group.
 * `block` has wr_bytes(...) bytes, 64-byte aligned. Returns 0, or -1 if the numbers do not fit together. */
WR_API int wr_pack(void *block, int64_t outputs, int64_t inputs, int64_t bits, int64_t groups, int64_t width,
            const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const int32_t *group);

/* y [rows][outputs] = x [rows][inputs] W^T, accumulated in float32, rounded once to `dtype`. Meant for few rows.
 * Returns 0, or -1 for a block that wr_pack did not make. */
WR_API int wr_matmul(const void *block, const void *x, void *y, int64_t rows, int dtype);

/* w [end - begin][inputs]: the dense weight of outputs begin to end, computed in float32 and rounded once to `dtype`.
 * Both are multiples of 16, but `end` may be the number of outputs. Returns 0, or -1 if they are not. */
WR_API int wr_restore(const void *block, void *w, int dtype, int64_t begin, int64_t end);

/* Scales (float16 values) and zeros, both float32 [rows][groups], that cost least for weight [rows][groups][width] under
 * energy [groups][width], among `count` shares of the widest grid; core/grid.py is the definition. Symmetric grids try
 * the whole width first, then both signs of every share; asymmetric ones the two zero points nearest to every share's.
 * A group that no candidate fits gets an infinite scale. Returns 0, or -1 for numbers that make no sense. */
WR_API int wr_search(const float *weight, const float *energy, int64_t rows, int64_t groups, int64_t width, int64_t bits,
                     int symmetric, const float *shares, int64_t count, float *scales, float *zeros);

/* One panel of GPTQ's column sweep, core/gptq.py being the definition. weight, target, scales and low (the smallest
 * step) are [columns][outputs], feedback [columns][stride] of which the first `columns` of a row count; steps and
 * errors [columns][outputs] are written, target is changed. Returns 0, or -1 for numbers that make no sense. */
WR_API int wr_sweep(const float *weight, float *target, const float *feedback, int64_t stride, const float *scales,
                    const float *low, float most, float *steps, float *errors, int64_t columns, int64_t outputs);

/* Whether the instruction set in use multiplies bfloat16: the functions below do nothing and return 1 otherwise. */
WR_API int wr_has_bfloat16(void);

/* upper [size][size] += rows^T rows, for bfloat16 rows [count][stride] of which the first `size` numbers count. Products
 * are exact and summed in float32. Entries below the diagonal are left undefined. Returns 0, -1 for numbers that make no
 * sense, 1 without products of bfloat16. */
WR_API int wr_gram(const uint16_t *rows, int64_t count, int64_t stride, int64_t size, float *upper);

/* total [m][n] += a^T b, for bfloat16 a [count][a_stride] and b [count][b_stride], of whose rows the first m and n numbers
 * count; otherwise as wr_gram. */
WR_API int wr_product(const uint16_t *a, int64_t a_stride, int64_t m, const uint16_t *b, int64_t b_stride, int64_t n,
                      int64_t count, float *total);

/* out [batch][queries][heads][depth] = softmax(scale * q k^T) v, all bfloat16, scores and sums in float32.
 * q is [batch][heads][queries][depth], k and v [batch][kv_heads][keys][depth], each with three strides (of a batch, a
 * head, a row) in numbers; the depth lies without gaps and is a multiple of 32, heads one of kv_heads. Query i sees the
 * keys up to i if `causal`, and those where mask [batch][queries][keys], bytes with two strides, is not 0; null is no
 * mask. A query that sees nothing gives zeros. Returns 0, -1 for numbers that make no sense, 1 as wr_gram does. */
WR_API int wr_attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint8_t *mask, uint16_t *out,
                     int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t depth,
                     const int64_t *strides, float scale, int causal);

#ifdef __cplusplus
}
#endif
#endif
