"""Recovery of what a cut and a coarser format cost: layer-wise healing, teacher cache, router KD, end-to-end QAD."""
