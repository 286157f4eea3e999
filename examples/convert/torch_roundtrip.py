# A ResNet file with torchvision's names → Flax linen → Flax nnx → back to the same file.
#
#     python examples/convert/torch_roundtrip.py resnet18.safetensors resnet18_again.safetensors
#
# From PyTorch: safetensors.torch.save_file(torchvision.models.resnet18(...).state_dict(), path)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))

import jax
import jax.numpy as jnp
import numpy as np
from command import DataError, Parser, check_place, new_file, one_line
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torchvision_resnet import NnxResNet, ResNet

from jaxbn import convert


def sizes(state):
    """The arguments of the ResNet whose state_dict this is."""
    blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
    if missing := {"conv1.weight", "fc.bias"} - state.keys():
        raise ValueError(f"no ResNet by torchvision's names: {', '.join(sorted(missing))} missing")
    counts = [sum(stage == f"layer{s}" for stage, _ in blocks) for s in (1, 2, 3, 4)]
    width, classes = len(state["conv1.weight"]), len(state["fc.bias"])
    return {"blocks": counts, "width": width, "classes": classes}


def loaded(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from None


def main(source, target):
    check_place("TARGET", Path(target))
    held = loaded(source)
    options = sizes(held)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)  # [B, H, W, C]

    linen = ResNet(**options)
    like = jax.eval_shape(linen.init, jax.random.key(0), x)  # shapes are enough
    variables, report = convert.from_torch(source, like, momentum=0.1, eps=1e-5)
    print(report)

    empty = nnx.eval_shape(lambda: NnxResNet(**options, rngs=nnx.Rngs(0)))
    model, _ = convert.linen_to_nnx(variables, empty)
    model.eval()
    difference = jnp.abs(linen.apply(variables, x) - model(x)).max()
    print(f"linen and nnx: logits differ by {difference:.1e} at most")

    # Without `source` the counts of updates would be 0: Flax keeps none with a momentum.
    state, _ = convert.to_torch(model, source)
    try:
        with new_file(Path(target)) as part:
            save_file(state, part)
    except SafetensorError as error:
        raise DataError(f"{target}: {' '.join(str(error).split())}") from None
    same = all((state[key] == value).all() for key, value in held.items())
    print(f"{target}: {len(state)} arrays, {'the same bits' if same else 'NOT the same'}")


if __name__ == "__main__":
    parser = Parser(
        prog="torch_roundtrip.py",
        description="A ResNet file with torchvision's names, to Flax linen, to Flax nnx, and back.",
        examples=[
            "python examples/convert/torch_roundtrip.py resnet18.safetensors a.safetensors",
            "python examples/convert/torch_roundtrip.py resnet34.safetensors a.safetensors",
            "python examples/convert/torch_roundtrip.py mine.safetensors again.safetensors",
        ],
    )
    parser.add_argument("source", help="a ResNet's file, with torchvision's names")
    parser.add_argument("target", help="the file to write")
    args = parser.parse_args()
    with one_line(parser):
        try:
            main(**vars(args))
        except ValueError as error:
            raise DataError(f"{args.source}: {' '.join(str(error).split())}") from None
