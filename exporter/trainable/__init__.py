"""DeepSeek-V4-Flash as a torch module that can be trained: whole sequences, no cache, f32 parameters.

It computes what :mod:`exporter.reference` computes in ``kv-v4`` mode, for as many experts a layer as a View keeps.
"""
