"""Forward passes with a paged cache: attention, kernels, CUDA graphs."""
