"""What is put in the place of a network's call and of methods, and taken away again without a trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch


class Method:
    """Stands in for a method of an object, with its signature; a copy of the object gets the object's own.

    Args:
        owner: the object.
        name: of the method.
        call: called with the method as it was, and the arguments.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:  # noqa: ANN401
        self.owner, self.name, self.call, self.inner = owner, name, call, getattr(owner, name)
        self.before = vars(owner).get(name)
        functools.update_wrapper(self, self.inner)
        object.__setattr__(owner, name, self)  # a compiled module hands plain assignments on to the one inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        return self.call(self.inner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # noqa: ANN401
        return copy.deepcopy(self.inner, memo) if id(self.owner) in memo else self

    def __reduce__(self) -> Any:  # noqa: ANN401
        return getattr, (self.owner, self.name)  # when it is read, the object's class has it

    def remove(self) -> None:
        """Puts back what was there; what somebody else put on top stays."""
        if vars(self.owner).get(self.name) is self:
            if self.before is None:
                object.__delattr__(self.owner, self.name)
            else:
                object.__setattr__(self.owner, self.name, self.before)


class NetworkCall:
    """Stands in for the call of a module, outside of its forward and of every hook on that.

    The slot is that of ``torch.nn.Module.compile``. Unlike a forward that was replaced, it survives diffusers'
    ``remove_all_hooks``, which offloading runs after every call of a pipeline, and no compiler traces it.

    Args:
        network: the module.
        call: called with this object and the arguments.
    """

    SLOT = "_compiled_call_impl"

    def __init__(self, network: torch.nn.Module, call: Callable[..., Any]) -> None:
        self.network, self.call = network, call
        self.before = vars(network).get(self.SLOT)
        object.__setattr__(network, self.SLOT, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102
        return self.call(self, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Runs the module as it was before."""
        return (self.before or self.network._call_impl)(*args, **kwargs)

    def remove(self) -> None:
        """Puts back what was there; a module compiled in place since then stays so."""
        if vars(self.network).get(self.SLOT) is self:
            if self.before is None:
                object.__delattr__(self.network, self.SLOT)
            else:
                object.__setattr__(self.network, self.SLOT, self.before)


def untouched(network: torch.nn.Module) -> Callable[..., Any]:
    """Returns a network's call as it is without what is attached."""
    call = vars(network).get(NetworkCall.SLOT)
    return call.run if isinstance(call, NetworkCall) else network


class Named:
    """A context manager around another one, which tells the name while it lasts."""

    def __init__(self, inner: Any, name: str, tell: Callable[[str | None], None]) -> None:  # noqa: ANN401
        self.inner, self.name, self.tell = inner, name, tell

    def __enter__(self) -> Any:  # noqa: ANN401
        self.tell(self.name)
        return self.inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:  # noqa: ANN401
        self.tell(None)
        return self.inner.__exit__(kind, error, trace)
