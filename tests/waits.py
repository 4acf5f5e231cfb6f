"""Counts the times that the host of a GPU would wait for it: operations whose result's size or value the host needs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave.Tensor"}
VALUES = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


class Waits(TorchDispatchMode):
    """`count` is the number of waits inside of the context; an index by bool is a nonzero of its own."""

    def __init__(self):
        super().__init__()
        self.count, self.tolist = 0, torch.Tensor.tolist

    def __enter__(self):
        def counted(tensor):  # on a CPU it is no operation
            self.count += 1
            return self.tolist(tensor)

        torch.Tensor.tolist = counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        by_index = name.startswith(("aten::index", "aten::_index_put_impl")) and len(args) > 1
        indices = args[1] if by_index and isinstance(args[1], list | tuple) else ()
        by_bool = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.count += name in SIZES | VALUES or by_bool
        return operation(*args, **(kwargs or {}))


def waits_of(call):
    """The number of waits in a call."""
    with Waits() as waits:
        call()
    return waits.count
