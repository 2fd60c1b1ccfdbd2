"""TF-Inception, the extractor of the FID, as each evaluation tool uses it: they differ in how they resize and scale."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from flowkit.eval import resize, trunk, weight_files
from flowkit.eval.features import Layer, check_images, check_layers, full_float32, library_versions
from flowkit.eval.onnx_graph import to_onnx
from flowkit.eval.resize import Resizer

SIZE = 299
MODES = ("reference", "fast", "compiled", "onnx")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Images at a time in compiled code, which is made for one batch size: smaller batches are filled up.
BATCH = 16


class Preset(NamedTuple):
    """What a tool does to images before the network: ``(x - shift) / scale`` after resizing levels 0 ... 255 to 299x299."""

    identity: str
    resizer: str
    shift: float
    scale: float
    preprocessing: str


_TF = Preset("fid-tf", "tf1", 128.0, 128.0, "TF1 bilinear 299, (x - 128) / 128")
PRESETS = {
    "fid-tf": _TF,
    # The same network and preprocessing in TensorFlow itself, so the same features: its statistics compare with fid-tf's.
    "adm": _TF,
    "fid-clean": Preset("fid-clean", "clean", 128.0, 128.0, "PIL float bicubic 299, clamped, (x - 128) / 128"),
    "fid-pytorch": Preset("fid-pytorch", "bilinear", 127.5, 127.5, "torch bilinear 299, x / 127.5 - 1"),
    "fid-torchmetrics": Preset(
        "fid-torchmetrics", "antialiased", 128.0, 128.0, "torch antialiased bilinear 299, (x - 128) / 128"
    ),
}


class InceptionExtractor:
    """TF-Inception's features of uint8 images, greyscale ones repeated over the three channels.

    Args:
        path: the weight file, see `flowkit.eval.weight_files.read_weights`. None looks in torch hub's folder (TORCH_HOME) and in
            the Hugging Face cache.
        device: where to compute.
        preset: whose figures to repeat: "fid-tf" (torch-fidelity, EDM), "adm" (the same features; also "spatial" for the sFID
            and "logits_unbiased" for the Inception score), "fid-clean", "fid-pytorch" or "fid-torchmetrics".
        layer: of `flowkit.eval.trunk.LAYERS`, what a call returns: "2048" (pooled), "64", "192", "768", "spatial",
            "logits_unbiased" or "logits". `features` returns any of them in one pass.
        mode: "reference" is torch-fidelity's computation bit for bit; "fast" folds the batch norms and stores channels last, to
            float32's rounding; "compiled" is that through torch.compile (a minute or more at the start); "onnx" through
            onnxruntime, on the CPU.
        dtype: "float32"; "float64" (features are then float64; "reference" or "fast"); or "bfloat16", a preview whose figures
            do not compare with others ("fast" or "compiled").
        cache: folder for compiled code, for "compiled": the process's TORCHINDUCTOR_CACHE_DIR from then on. None leaves torch's
            choice.

    Attributes:
        layers: the dimension of each layer that `features` can return.

    Raises:
        FileNotFoundError: where there is no weight file; names it and says where to put it. Nothing is downloaded.
        ImportError: for "onnx" without onnxruntime.
        ValueError: for an unknown name or a combination that does not exist, and for a file of another hash or with other
            tensors.
    """

    layers: Mapping[str, int] = trunk.LAYERS

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        preset: str = "fid-tf",
        layer: str = "2048",
        mode: str = "fast",
        dtype: str = "float32",
        cache: str | PathLike[str] | None = None,
    ) -> None:
        _check_options(preset, layer, mode, dtype, torch.device(device), cache)
        path = weight_files.find_weights() if path is None else Path(path)
        self._build(weight_files.read_weights(path), str(path), device, preset, layer, mode, dtype, cache)

    @classmethod
    def random(cls, seed: int = 0, device: torch.device | str = "cpu", **options: Any) -> InceptionExtractor:  # noqa: ANN401
        """Returns the network with random weights (He et al. 2015), for tests and timing; its figures mean nothing else.

        Args:
            seed: of the weights.
            device: where to compute.
            **options: preset, layer, mode, dtype and cache, as for the class.
        """
        options = {"preset": "fid-tf", "layer": "2048", "mode": "fast", "dtype": "float32", "cache": None} | options
        _check_options(device=torch.device(device), **options)
        self = cls.__new__(cls)
        self._build(random_weights(seed), f"random, seed {seed}", device, **options)
        return self

    def _build(
        self,
        state: Mapping[str, Tensor],
        source: str,
        device: torch.device | str,
        preset: str,
        layer: str,
        mode: str,
        dtype: str,
        cache: str | PathLike[str] | None,
    ) -> None:
        with torch.device("meta"):
            network = trunk.Trunk()
        # Copies, since folding changes a network's weights and a caller's state dict is not ours to change.
        weight_files.load(network, {name: tensor.clone() for name, tensor in state.items()}, source)
        network = network.to(device, torch.float32).eval().requires_grad_(False)
        if mode != "reference":
            network = trunk.fold(network)
        self._fc = copy.deepcopy(network.fc).to(torch.float64 if dtype == "float64" else torch.float32)
        self.network = network.to(DTYPES[dtype])
        self.name, self.dim, self.device = preset, trunk.LAYERS[layer], device
        self._preset, self._layer, self._dtype = PRESETS[preset], layer, DTYPES[dtype]
        self._resize = _torch_fidelitys_tf1 if mode == "reference" and preset in ("fid-tf", "adm") else None
        self._mode, self._cache, self._compiled = (
            mode,
            cache,
            dict[tuple[str, ...], Callable[[Tensor], Sequence[Tensor]]](),
        )
        self.identity = {
            "name": self._preset.identity,
            "weights": weight_files.content_hash(state),
            "preprocessing": self._preset.preprocessing,
            "layer": layer,
            "dtype": dtype if dtype != "bfloat16" else "bfloat16 (preview)",
            "tf32": "off",
            "mode": mode,
            "versions": library_versions("torch", *(["onnxruntime"] if mode == "onnx" else [])),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features, float32 (B, dim), of images, uint8 (B, 1 or 3, H, W)."""
        return self.features(images, (self._layer,))[self._layer]

    def layer(self, name: str) -> Layer:
        """Returns an extractor of another layer that shares this one's network."""
        return Layer(self, name)

    def features(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Returns several layers from one pass.

        Args:
            images: uint8 (B, 1 or 3, H, W).
            layers: of `layers`.

        Returns:
            Features by layer, (B, d), float32 (float64 where that is the dtype).
        """
        check_layers(layers, self.layers)
        with torch.no_grad(), full_float32():
            x = self.preprocess(images)
            needed = trunk.stages(layers)
            activations = self._run(x.to(self._dtype), needed)
            # Averages and logits of a preview are float32 again.
            activations = [a.to(self._fc.weight.dtype) for a in activations]
            return trunk.heads(dict(zip(needed, activations, strict=True)), layers, self._fc)

    def preprocess(self, images: Tensor) -> Tensor:
        """Returns what the network sees, (B, 3, 299, 299), of images, uint8 (B, 1 or 3, H, W)."""
        if check_images(images).shape[1] not in (1, 3):
            raise ValueError(
                f"Inception takes 1 or 3 channels, got {images.shape[1]}; composite alpha onto a background first"
            )
        x = images.to(self.device).to(torch.float64 if self._dtype == torch.float64 else torch.float32)
        resizer: Resizer = self._resize or resize.resizer(self._preset.resizer)
        # Resized before it is repeated: a third of the work for greyscale.
        x = (resizer(x, SIZE) - self._preset.shift) / self._preset.scale
        return x.expand(-1, 3, -1, -1)

    def _run(self, x: Tensor, needed: tuple[str, ...]) -> Sequence[Tensor]:
        if self._mode == "reference":
            activations: tuple[Tensor, ...] = self.network(x, needed)
            return activations
        if self._mode == "fast":
            activations = self.network(x.contiguous(memory_format=torch.channels_last), needed)
            return activations
        if needed not in self._compiled:
            stage = _Stages(self.network, needed)
            self._compiled[needed] = _onnx(stage) if self._mode == "onnx" else _inductor(stage, self._cache)
        pieces = [self._compiled[needed](piece) for piece in x.split(BATCH)]
        return [torch.cat(own) for own in zip(*pieces, strict=True)]


class _Stages(torch.nn.Module):
    """The network with its outputs chosen, as compilers want it."""

    def __init__(self, network: trunk.Trunk, needed: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.needed = network, needed

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.network(x, self.needed)
        return outputs


def _inductor(network: _Stages, cache: str | PathLike[str] | None) -> Callable[[Tensor], Sequence[Tensor]]:
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    compiled = torch.compile(network, dynamic=False)
    # Set for the whole process while it compiles: as an option of torch.compile it comes too late for the tracer, which then
    # passes weights as arguments, and convolutions are neither packed nor fused.
    config: Any = import_module("torch._inductor.config")

    def run(x: Tensor) -> Sequence[Tensor]:
        filled = torch.cat([x, x.new_zeros(BATCH - len(x), *x.shape[1:])]) if len(x) < BATCH else x
        with config.patch(freezing=True):
            return [y[: len(x)] for y in compiled(filled.contiguous(memory_format=torch.channels_last))]

    return run


def _onnx(network: _Stages) -> Callable[[Tensor], Sequence[Tensor]]:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(to_onnx(network, SIZE), options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.contiguous().numpy()})]


def _torch_fidelitys_tf1(x: Tensor, size: int) -> Tensor:
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(x, size=(size, size), align_corners=False)
    return resized


def _check_options(
    preset: str, layer: str, mode: str, dtype: str, device: torch.device, cache: str | PathLike[str] | None
) -> None:
    for name, value, known in (
        ("preset", preset, PRESETS),
        ("layer", layer, trunk.LAYERS),
        ("mode", mode, MODES),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(known)}")
    able = {"reference": ("float32", "float64"), "compiled": ("float32", "bfloat16"), "onnx": ("float32",)}
    if dtype not in able.get(mode, DTYPES):
        raise ValueError(f"mode {mode!r} does not compute in {dtype}; choose {' or '.join(able[mode])}, or mode='fast'")
    if cache is not None and mode != "compiled":
        raise ValueError(f"cache={str(cache)!r} is for compiled code, mode is {mode!r}; leave it out")
    if mode == "onnx":
        if device.type != "cpu":
            raise ValueError(f"mode 'onnx' computes on the CPU, got device {str(device)!r}; choose mode='fast'")
        try:
            import_module("onnxruntime")
        except ImportError as error:
            raise ImportError(
                "mode 'onnx' needs onnxruntime; pip install 'flowkit-diffusion[onnx]', or choose mode='fast'"
            ) from error


def random_weights(seed: int) -> dict[str, Tensor]:
    """Returns a state dict for the network: convolutions normal with variance 2 / fan-in, batch norms neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in trunk.Trunk().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("conv.weight", "fc.weight")):
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = torch.ones(shape)
        else:
            state[name] = torch.zeros(
                shape, dtype=torch.int64 if name.endswith("num_batches_tracked") else torch.float32
            )
    return state
