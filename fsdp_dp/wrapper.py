"""`FullyShardedDataParallel` with a ``privacy`` argument: the import that turns an FSDP script private."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP

from fsdp_dp.config import PrivacyConfig
from fsdp_dp.engine import PrivacyEngine, make_private
from fsdp_dp.errors import PrivacyError
from fsdp_dp.sharding.fsdp1 import is_outermost

_ORIG_PARAMS = "use_orig_params"
_ORIG_PARAMS_POSITION = list(inspect.signature(TorchFSDP.__init__).parameters).index(_ORIG_PARAMS) - 2


class FullyShardedDataParallel(TorchFSDP):
    """``torch.distributed.fsdp.FullyShardedDataParallel`` whose gradients are differentially private.

    Takes the arguments of torch's class, and ``privacy`` on the root. Inner units, wrapped by hand or by an
    ``auto_wrap_policy``, need none. ``use_orig_params`` is True unless given.

    Attributes:
        privacy_engine: the `PrivacyEngine` of the root; None on inner units.
    """

    privacy_engine: PrivacyEngine | None = None

    def __init__(self, module: nn.Module, *args: Any, privacy: PrivacyConfig | None = None, **kwargs: Any) -> None:
        if len(args) <= _ORIG_PARAMS_POSITION:
            kwargs.setdefault(_ORIG_PARAMS, True)
        super().__init__(module, *args, **kwargs)
        if privacy is not None:
            self.privacy_engine = make_private(self, privacy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.privacy_engine is None and is_outermost(self):
            raise PrivacyError(
                "fsdp_dp.FullyShardedDataParallel was made the root of a model without privacy=PrivacyConfig(...), so "
                "it would train without privacy. Pass privacy to the outermost wrapper, or use torch's class"
            )
        return super().forward(*args, **kwargs)
