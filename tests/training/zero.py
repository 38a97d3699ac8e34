"""What tests ask of a model in a DeepSpeed engine, on the CPU and on GPUs. Choose DeepSpeed's accelerator before."""

import deepspeed


def parameters(module):
    found = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(found.values())):
        return {name: p.detach().clone() for name, p in found.items()}


def idioms(module, path):
    """Of each program of the module at `path`."""
    programs = module.get_submodule(path)._ligerfx_programs.values()
    return [sorted(i for match in p.matches for i in match.pattern.idioms) for p in programs]
