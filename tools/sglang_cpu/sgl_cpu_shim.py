"""Lets torchvision's CUDA wheel be imported beside CPU torch (README.md in tools/sglang_cpu of megatron_pz).

torchvision registers Python versions of `nms` and `qnms` when it is imported, whether or not its library of operators
could be loaded; torch refuses to register what has no schema. So the schemas are declared just before. SGLang imports
torchvision for pictures; no picture ever comes, so the operators are never called.
"""

import sys


class BeforeTorchvision:
    """An import hook that acts once, when torchvision is first looked for, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)  # once is enough, and torch's own imports need not come by here
            declare_operators()
        return None  # the next finder finds it


def declare_operators():
    import torch  # here and not above: most processes of this environment never import torchvision

    if torch.version.cuda is not None:
        return  # a CUDA build loads torchvision's library, which declares its operators itself
    schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._schemas_of_torchvision = schemas  # the declaration lasts as long as this object


sys.meta_path.insert(0, BeforeTorchvision())
