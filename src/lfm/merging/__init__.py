"""Merge recipes in mergekit's language: what each tensor of the result is made of, and with which settings.

`recipe` reads the YAML, `layout` says which tensors of which models meet (slices, modules, tied weights), `described`
what the config says of that, `settings` what a method is told of each tensor (gradients over layers, filters),
`vocabulary` how tables of different tokenizers are brought to one, `tokenizer` which one the result has.
"""
