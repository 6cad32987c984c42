"""Compiling the layers of a model."""

import shutil

import torch

from model.transformer import Transformer

CXX_COMPILERS = ("c++", "g++", "clang++", "cl")
RECOMPILE_LIMIT = 32  # graphs of one layer's code; past it layers would run uncompiled


def require_compiler(remedy: str) -> None:
    """Raise ValueError if layers cannot be compiled, before anything else is done."""
    if not torch.cuda.is_available() and not any(map(shutil.which, CXX_COMPILERS)):
        raise ValueError(f"--compile needs a C++ compiler, one of {', '.join(CXX_COMPILERS)}; none was found: {remedy}")


def compile_layers(model: Transformer) -> None:
    """Compile the layers: one graph for the first shape and one for all others, each with and without gradients, for
    every kind of mask, for the last layer and for the others."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.optimize_ddp = False  # which would cut a layer in two where its buckets end
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)  # and not the hooks around it, which FSDP2 has


def uncompile(model: Transformer) -> None:
    """Undo `compile_layers`."""
    for layer in model.layers:
        del layer.forward
