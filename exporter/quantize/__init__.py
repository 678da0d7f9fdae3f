"""What is ours to quantize: dense linears FP8 → MXFP4, trained tensors → MXFP4, the head → FP8, exact casts to int8."""
