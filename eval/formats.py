"""Files of feature statistics: those of other tools are read without running what is in them, and written for them to read.

    .safetensors   ours
    .npz           mu, sigma: pytorch-fid, clean-fid, EDM, ours; and mu_s, sigma_s (spatial features): ADM
    .pkl           {"fid": {mu, sigma}, "fd_dinov2": {mu, sigma}, "num_images"}: EDM2
    .pt            {mu, sigma} or features (N, d): torch-fidelity's cache

None but ours says which extractor made it, so its identity is None and results say that it is unknown.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit import weights
from flowkit.eval.statistics import FeatureStats, as_moments

# Above this share of the largest variance, a negative eigenvalue is not rounding (float16 statistics reach 1e-3).
_INDEFINITE = 1e-2
_KINDS = (".safetensors", ".npz", ".pkl", ".pt")
# What files of other tools leave open is taken for this extractor.
FOREIGN = (".npz", ".pkl", ".pt")


def read_statistics(path: str | PathLike[str]) -> list[FeatureStats]:
    """Reads all sets of statistics in a file, the one for the FID first.

    Args:
        path: see the kinds above; the end of the name says which.

    Returns:
        Checked statistics: symmetric, positive semidefinite to rounding, finite, float64. Those of other tools have no identity,
        and no count but where the file has it.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for another kind of file, one that is broken or holds anything but arrays, or numbers that cannot be
            statistics. The file is named.
    """
    path = Path(path)
    if path.suffix not in _KINDS:
        raise ValueError(f"{path} is no file of statistics; use one that ends with {', '.join(_KINDS)}")
    if path.suffix in FOREIGN and not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}; check the path")
    readers: dict[str, Callable[[Path], list[FeatureStats]]] = {
        ".safetensors": lambda path: [FeatureStats.load(path)],
        ".npz": _read_npz,
        ".pkl": _read_edm2,
        ".pt": _read_torch_fidelity,
    }
    found = readers[path.suffix](path)
    for stats in found:
        check_covariance(stats.covariance(), str(path))
    return found


def check_covariance(sigma: Tensor, source: str) -> None:
    """Refuses a matrix that no features could have.

    Args:
        sigma: symmetric, float64 (d, d).
        source: what an error begins with, e.g. the file's name.

    Raises:
        ValueError: for an eigenvalue below -0.01 of the largest variance.
    """
    largest = float(sigma.diagonal().max())
    # Cholesky exists exactly where all eigenvalues are above minus the shift, at a tenth of the cost of the eigenvalues.
    shifted = (sigma + sigma.T) / 2 + torch.eye(
        len(sigma), dtype=sigma.dtype, device=sigma.device
    ) * largest * _INDEFINITE
    if largest < 0 or (largest > 0 and int(torch.linalg.cholesky_ex(shifted).info)) or (largest == 0 and sigma.any()):
        raise ValueError(
            f"{source}: sigma has negative eigenvalues, which no covariance has; make the statistics again"
        )


def write_npz(path: str | PathLike[str], stats: FeatureStats, spatial: FeatureStats | None = None) -> None:
    """Writes an .npz file that pytorch-fid, clean-fid, EDM and ADM read back to the same distance, bit for bit.

    Args:
        path: the file. clean-fid wants it in its folder ``stats`` as ``NAME_MODE_custom_na.npz``.
        stats: of the FID's features.
        spatial: of the sFID's, as mu_s and sigma_s.
    """
    stats.to_npz(path)
    if spatial is not None:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.covariance().cpu().numpy()}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        weights.write_bytes(path, buffer.getvalue())


def write_torch_fidelity(path: str | PathLike[str], stats: FeatureStats) -> None:
    """Writes a .pt file as torch-fidelity caches it: ``CACHE_ROOT/NAME-inception-v3-compat-stat-fid-2048.pt``.

    Args:
        path: the file.
        stats: of the features. torch-fidelity compares dtypes and keeps means in float32, so the mean is rounded to that.
    """
    buffer = io.BytesIO()
    arrays = {"mu": stats.mean.cpu().float().numpy(), "sigma": stats.covariance().cpu().numpy()}
    torch.save(arrays, buffer)
    weights.write_bytes(path, buffer.getvalue())


def _read_npz(path: Path) -> list[FeatureStats]:
    found = [FeatureStats.from_npz(path)]
    try:
        with np.load(path, allow_pickle=False) as file:
            if {"mu_s", "sigma_s"} <= set(file.files):
                found.append(_foreign(file["mu_s"], file["sigma_s"], f"{path}: spatial "))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a plain .npz file of arrays ({error}); copy or make it again") from error
    return found


def _read_edm2(path: Path) -> list[FeatureStats]:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        raise ValueError(f"{path} was not read: {error}; use statistics in an .npz file") from error
    except Exception as error:  # a broken pickle can fail with anything
        raise ValueError(f"{path} is broken or no pickle ({type(error).__name__}: {error}); copy it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}, not EDM2's statistics by metric; use an .npz file")
    sets = [content] if "mu" in content else [content[key] for key in ("fid", "fd_dinov2") if key in content]
    if not sets:
        raise ValueError(
            f"{path} has neither 'fid' nor 'fd_dinov2' (found: {', '.join(map(str, content))}); use an .npz file"
        )
    count = content.get("num_images")
    return [_from_mapping(one, path, int(count) if count is not None else None) for one in sets]


def _read_torch_fidelity(path: Path) -> list[FeatureStats]:
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} was not read, it holds more than arrays ({reason}); use an .npz file") from error
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is broken or not torch-fidelity's ({reason}); copy or make it again") from error
    if isinstance(content, Tensor):
        if content.ndim != 2 or not content.is_floating_point():
            raise ValueError(
                f"{path} holds a tensor {content.dtype} {tuple(content.shape)}, not features (N, d); make it again"
            )
        stats = FeatureStats.empty(content.shape[1])
        for block in content.split(1024):
            stats.update(block)
        return [stats]
    return [_from_mapping(content, path, None)]


def _from_mapping(content: Any, path: Path, count: int | None) -> FeatureStats:  # noqa: ANN401
    if not isinstance(content, Mapping) or not {"mu", "sigma"} <= content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} has no mu and sigma (found: {found}); FID statistics hold both")
    stats = _foreign(content["mu"], content["sigma"], f"{path}: ")
    return stats if count is None else FeatureStats(count, stats.mean, stats.m2 * (count - 1))


def _foreign(mean: Any, covariance: Any, source: str) -> FeatureStats:  # noqa: ANN401
    return FeatureStats(None, *as_moments(mean, covariance, source))


def _numpy_globals() -> list[Any]:
    """What arrays are made of in a pickle, under the names of NumPy 1 and 2."""
    reconstruct, scalar = np._core.multiarray._reconstruct, np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")]
    old = [(reconstruct, "numpy.core.multiarray._reconstruct"), (scalar, "numpy.core.multiarray.scalar")]
    return [reconstruct, scalar, np.ndarray, np.dtype, *dtypes, *old]


class _Refused(pickle.UnpicklingError):
    """Something in a pickle that is neither an array nor a dictionary."""


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles hold the bytes of arrays; no other codec is needed."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused(f"it encodes {type(text).__name__} as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Finds what numpy arrays and dictionaries are made of, and nothing else; nothing of the file is called or imported."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        new = module.replace("numpy.core", "numpy._core")
        known = {
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
            ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
            ("dnnlib.util", "EasyDict"): dict,
        }
        if (new, name) not in known:
            raise _Refused(f"it names {module}.{name}, which arrays do not need and which could run code")
        return known[new, name]
