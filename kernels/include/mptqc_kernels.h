/* The kernels of the operators in docs/custom-ops.md: raw pointers, sizes, a status; no framework.
 *
 * Each operator is a struct of arguments, the number of tasks it falls into, and a function that runs one of them. Tasks
 * are independent, may run on any threads at once, and do not depend on how many there are. The functions check the
 * struct's sizes and quantizers; that pointers hold what the sizes say is the caller's part.
 *
 * Codes are uint8. A blocked weight of K inputs and N outputs is int8 [ceil(N/16)][ceil(K/4)][16][4].
 */
#ifndef MPTQC_KERNELS_H
#define MPTQC_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define MPTQC_EXPORT __declspec(dllexport)
#else
#define MPTQC_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MPTQC_BLOCK_OUTPUTS 16
#define MPTQC_BLOCK_INPUTS 4
#define MPTQC_PANEL 64 /* what the arrays of one value per output are padded to */

typedef enum { MPTQC_OK = 0, MPTQC_INVALID_ARGUMENT = 1, MPTQC_OUT_OF_MEMORY = 2, MPTQC_CUDA_FAILURE = 3 } mptqc_status;

/* Worst to best of each processor. */
typedef enum {
  MPTQC_PORTABLE = 0,
  MPTQC_NEON_DOTPROD = 1,
  MPTQC_NEON_I8MM = 2,
  MPTQC_AVX2 = 3,
  MPTQC_AVX_VNNI = 4,
  MPTQC_AVX512_VNNI = 5,
  MPTQC_AMX_INT8 = 6,
  MPTQC_ISA_COUNT = 7
} mptqc_isa;

/* "portable", "neon_dotprod", "neon_i8mm", "avx2", "avx_vnni", "avx512_vnni", "amx_int8". */
MPTQC_EXPORT const char* mptqc_isa_name(mptqc_isa isa);

/* 1 if this build and this processor have it, and the system allows it, else 0. */
MPTQC_EXPORT int mptqc_isa_runs_here(mptqc_isa isa);

/* The one called `name`, or the best that runs here if name is null or empty; invalid if unknown or absent. */
MPTQC_EXPORT mptqc_status mptqc_choose_isa(const char* name, mptqc_isa* isa);

/* Regions of a quantizer above the lowest, at most. */
#define MPTQC_UPPER_REGIONS 3

/* See "Codes and quantizers" in docs/custom-ops.md. */
typedef struct {
  float scale;
  int32_t zero_point, minimum, maximum, regions; /* upper regions: 0 is uniform */
  int32_t m[MPTQC_UPPER_REGIONS], split[MPTQC_UPPER_REGIONS];
} mptqc_quantizer;

/* Null if the quantizer is sound, else what is wrong with it. */
MPTQC_EXPORT const char* mptqc_quantizer_fault(const mptqc_quantizer* quantizer);

/* y = quantizer(gamma * (x - mean) / sqrt(variance + epsilon) + beta) */
typedef struct {
  int64_t rows, width;
  const float *input, *gamma, *beta; /* [rows, width], [width], [width] */
  float epsilon;
  int64_t table_size; /* 0: none; else it divides rows */
  const int64_t* table; /* output row r of a group of table_size is made from its input row table[r] */
  mptqc_quantizer quantizer;
  uint8_t* output; /* [rows, width] */
} mptqc_layer_norm;

MPTQC_EXPORT int64_t mptqc_layer_norm_tasks(const mptqc_layer_norm* arguments);
MPTQC_EXPORT mptqc_status mptqc_layer_norm_run(mptqc_isa isa, const mptqc_layer_norm* arguments, int64_t task);

/* y = gamma * (x - mean) / sqrt(variance + epsilon) + beta + residual; codes = quantizer(y) */
typedef struct {
  int64_t rows, width;
  const float *input, *gamma, *beta; /* [rows, width], [width], [width] */
  float epsilon;
  int64_t table_size; /* 0: none; else it divides rows */
  const int64_t* table; /* output row r of a group of table_size is made from its input row table[r] */
  const float* residual; /* [rows, width], or null; it may lie where the output is to be */
  float* output; /* [rows, width] */
  const mptqc_quantizer* quantizer; /* null: there are no codes */
  int64_t code_table_size; /* 0: none; else it divides rows */
  const int64_t* code_table; /* row r of a group of code_table_size goes to its row code_table[r] of codes; a permutation */
  uint8_t* codes; /* [rows, width] */
} mptqc_layer_norm_add;

MPTQC_EXPORT int64_t mptqc_layer_norm_add_tasks(const mptqc_layer_norm_add* arguments);
MPTQC_EXPORT mptqc_status mptqc_layer_norm_add_run(
    mptqc_isa isa, const mptqc_layer_norm_add* arguments, int64_t task);

/* x/2 * (1 + erf(x/sqrt 2)); x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))); x / (1 + e^(-1.702 x)); x / (1 + e^-x) */
typedef enum {
  MPTQC_NO_ACTIVATION = 0,
  MPTQC_GELU = 1,
  MPTQC_GELU_TANH = 2,
  MPTQC_QUICK_GELU = 3,
  MPTQC_SILU = 4
} mptqc_activation;

/* Rotary position embedding of heads of `width` outputs, 2 to 64 and a power of two: y * cosine + y' * sine, where y' is y
   with the halves of each head changed over. Row r and output n take entry [r % tokens, n % columns] of the tables. */
typedef struct {
  int64_t tokens, columns, width; /* tokens divides rows; columns is 64, or all outputs if they are whole panels */
  const float *cosine, *sine; /* [tokens, columns]; null: there is no rotation */
} mptqc_rotary;

/* Heads of `width` outputs brought to length 1: y / max(|y|, epsilon), |y| being the root of the head's sum of squares. */
typedef struct {
  int64_t width; /* 16, 32 or 64, and divides the outputs; 0: heads keep their length */
  float epsilon; /* above 0 */
} mptqc_unit_heads;

/* y = activation(float(sum(input * weight) + offset) * scale + bias), then the heads' length, then * multiplier, then
   * factor, then the rotation, then + residual, then the quantizer. Heads' lengths go with no activation, a factor with no
   activation or table, a rotation with no residual besides. */
typedef struct {
  int64_t rows, inputs, outputs;
  const uint8_t* input; /* [rows, inputs] */
  const int8_t* weight; /* blocked */
  const int32_t* offset; /* offset, scale, bias: [outputs rounded up to 64] */
  const float *scale, *bias;
  int32_t activation;
  const float* multiplier; /* [outputs rounded up to 64], or null */
  const float* residual; /* [rows, outputs], or null; on a CPU it may lie where a float output is to be */
  int64_t table_size; /* 0: none; else it divides rows */
  const int64_t* table; /* row r of a group of table_size goes to its output row table[r]; a permutation */
  const mptqc_quantizer* quantizer; /* null: the output is float */
  void* output; /* [rows, outputs] uint8 or float */
  int32_t span; /* the weight's, or 0: not known. Small weights are multiplied faster without VNNI */
  mptqc_rotary rotary;
  const float* factor; /* [rows, outputs], or null */
  mptqc_unit_heads unit_heads;
  int32_t by_rows; /* tasks are of few rows, so that threads find in their caches what they wrote; else of few outputs, so
    * that weights are fetched once. The outputs are the same */
} mptqc_linear;

MPTQC_EXPORT int64_t mptqc_linear_tasks(const mptqc_linear* arguments);
MPTQC_EXPORT mptqc_status mptqc_linear_run(mptqc_isa isa, const mptqc_linear* arguments, int64_t task);

/* offset[n] = -zero_point * sum_k weight[k, n] for each output: what makes a sum over codes one over (code - zero_point). */
MPTQC_EXPORT void mptqc_linear_offset(
    const int8_t* weight, int64_t inputs, int64_t outputs, int32_t zero_point, int32_t* offset);

/* How many groups of 4 inputs can be multiplied with any codes and summed in 16 bits, the first two of each group and the last
   two apart: 16, 8, 6, 4, 3, 2 or 1, counted off from the first input on, those that are left one by one; 0: no such number. */
MPTQC_EXPORT int32_t mptqc_linear_span(const int8_t* weight, int64_t inputs, int64_t outputs);

/* Added to the scores of an attention: float [windows, heads, rows, columns]; batch entry b takes window b % windows. */
typedef struct {
  const float* data; /* null: nothing is added */
  int64_t windows, heads, rows; /* heads and rows: as the attention's, or 1 */
} mptqc_addend;

/* S = softmax(float(sum((q - q_zero)(k - k_zero))) * score_scale + bias + mask), r = row_scale ? max(S) : 1 by row;
   P = probability(S / r);  y = float(sum((P - P_zero)(v - v_zero))) * context_scale * r, then the quantizer */
typedef struct {
  int64_t batch, heads, rows, columns, width, value_width;
  const uint8_t *q, *k, *v; /* [batch, rows, heads * width], [batch, columns, heads * width | value_width] */
  int32_t q_zero_point, k_zero_point, v_zero_point;
  float score_scale, context_scale;
  mptqc_addend bias, mask;
  int32_t row_scale;
  mptqc_quantizer probability;
  const mptqc_quantizer* quantizer; /* null: the output is float */
  void* output; /* [batch, rows, heads * value_width] uint8 or float */
  int32_t by_heads; /* tasks are of whole heads, as far as 256 rows: keys and values are prepared once. Else there are more
    * tasks, for more threads. The outputs are the same */
} mptqc_attention;

MPTQC_EXPORT int64_t mptqc_attention_tasks(const mptqc_attention* arguments);
MPTQC_EXPORT mptqc_status mptqc_attention_run(mptqc_isa isa, const mptqc_attention* arguments, int64_t task);

/* output[b, i, j, c, p, q] = quantizer(input[b, c, i * patch_height + p, j * patch_width + q]) */
typedef struct {
  int64_t batch, channels, height, width, patch_height, patch_width;
  const float* input; /* [batch, channels, height, width] */
  mptqc_quantizer quantizer;
  uint8_t* output; /* [batch, height / patch_height, width / patch_width, channels * patch_height * patch_width] */
} mptqc_patches;

MPTQC_EXPORT int64_t mptqc_patches_tasks(const mptqc_patches* arguments);
MPTQC_EXPORT mptqc_status mptqc_patches_run(mptqc_isa isa, const mptqc_patches* arguments, int64_t task);

/* No operator, but what the compiler codes weights with: the codes of each row whose weights are nearest to it, least
   sum_n importance[n] * (input[r, n] - weight[n])^2. A task is a row. What codes mean: docs/method.md, Trellis. */
typedef struct {
  int64_t rows, columns;
  int32_t bits, taps; /* 2 to 5 bits, windows of `taps` codes: of 10 to 12 bits */
  int32_t first_state; /* the window before a row */
  const float* values; /* [2^(bits * taps)]: the weight of each window of unsigned codes, the newest in the lowest bits */
  const float* input; /* [rows, columns] */
  const float* importance; /* [columns] */
  int8_t* output; /* the codes, [rows, columns], signed */
} mptqc_trellis;

MPTQC_EXPORT int64_t mptqc_trellis_tasks(const mptqc_trellis* arguments);
MPTQC_EXPORT mptqc_status mptqc_trellis_run(mptqc_isa isa, const mptqc_trellis* arguments, int64_t task);

#ifdef __cplusplus
}
#endif

#endif
