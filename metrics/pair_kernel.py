"""Count the scores of a tile on a GPU in one kernel, in place of the steps that `pair_counts` takes on the CPU.

A block of threads counts the pairs of one cluster of rows with one cluster of columns: coarse scores in the memory of
its multiprocessor, added up for both clusters at its end; grid numbers in the table of all of them, which stays in the
GPU's cache. The product of the tile is left to the caller.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("frontalis.metrics")

THREADS = 512  # measured on an H100: 256 to 512 are as fast, 128 up to a third slower

_SOURCE = r"""
extern "C" __global__ void count_tile(
    const float* scores, int width,                  // [rows, width] of the tile
    int top, int bottom, int left, int right,        // the tile's rows and columns, as row numbers
    const int* edges, int row_edge, int column_edge, // where clusters begin; the first that the tile's rows have
    const int* subject, const int* cluster, const int* duplicate,
    int* impostor,                                   // counters by grid number
    unsigned long long* ends,                        // counters by cluster and coarse score
    int* genuine, unsigned long long* n_genuine)     // grid number and cluster of each genuine pair
{
    __shared__ int coarse[COARSE_BINS];
    const int first_row = max(top, edges[row_edge + blockIdx.y]);
    const int last_row = min(bottom, edges[row_edge + blockIdx.y + 1]);
    const int first_column = max(left, edges[column_edge + blockIdx.x]);
    const int last_column = min(right, edges[column_edge + blockIdx.x + 1]);
    if (last_column <= first_row + 1) return;  // below the diagonal
    for (int bin = threadIdx.x; bin < COARSE_BINS; bin += blockDim.x) coarse[bin] = 0;
    __syncthreads();

    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int column = first_column + threadIdx.x % 32; column < last_column; column += 32) {
        const int column_subject = subject[column], column_duplicate = duplicate[column];
        #pragma unroll 4
        for (int row = first_row + warp; row < last_row; row += warps) {
            const float score = scores[(long long)(row - top) * width + (column - left)];
            if (column <= row || duplicate[row] == column_duplicate) continue;
            // As metrics.cosine.shift_to_grid: the bits of a float32 between 2 and 4 count the steps of the grid.
            const int number = __float_as_int(fminf(fmaxf(score + 3.0f, 2.0f), 4.0f)) - __float_as_int(2.0f);
            if (subject[row] == column_subject) {
                const unsigned long long at = atomicAdd(n_genuine, 1ull);
                genuine[2 * at] = number;
                genuine[2 * at + 1] = cluster[row];
            } else {
                atomicAdd(&impostor[number], 1);
                atomicAdd(&coarse[number >> COARSE_SHIFT], 1);
            }
        }
    }
    __syncthreads();
    unsigned long long* of_row = ends + (long long)cluster[first_row] * ENDS_WIDTH;
    unsigned long long* of_column = ends + (long long)cluster[first_column] * ENDS_WIDTH;
    for (int bin = threadIdx.x; bin < COARSE_BINS; bin += blockDim.x) {
        if (const int count = coarse[bin]) {
            atomicAdd(&of_row[bin], (unsigned long long)count);
            atomicAdd(&of_column[bin], (unsigned long long)count);
        }
    }
}
"""


@functools.cache
def count_tile(**constants: int) -> Callable[..., Any] | None:
    """Return the compiled kernel with these constants, or None where this torch cannot compile one."""
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    try:
        kernel: Callable[..., Any] = torch.cuda._compile_kernel(defines + _SOURCE, "count_tile")
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        log.warning("this torch compiles no CUDA kernel (%s); scores are counted step by step", error)
        return None
    return kernel
