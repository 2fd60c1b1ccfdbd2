"""Networks that are exact: posterior means of Gaussian mixtures on any path, as diffusers models.

With data ``x0 ~ sum_k w_k N(m_k, diag(v_k))`` and ``x = alpha x0 + sigma eps`` the posterior is a mixture again, with
``V_k = alpha^2 v_k + sigma^2``, responsibilities ``r_k ~ w_k N(x; alpha m_k, V_k)`` and

    E[x0 | x]  = sum_k r_k (m_k + alpha v_k / V_k (x - alpha m_k)),
    E[eps | x] = sum_k r_k sigma / V_k (x - alpha m_k),

both finite at either end. One component is a Gaussian; v = 0 is a finite set of points, whose exact denoiser memorises it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from flowkit import paths, predictions
from flowkit.paths import Path


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """The exact network of a Gaussian mixture, in a diffusers pipeline's place for a UNet or transformer.

    It saves and loads like any diffusers model; means, variances, weights and labels are its weights.

    Args:
        shape: shape of one sample, such as (2,) or (1, 8, 8).
        components: number K of mixture components.
        path: name of the path, "flow", "vp", "cosine", "ve" or "edm".
        prediction_type: what `forward` returns, one of `flowkit.predictions.PREDICTIONS`; None means flow_prediction on the flow
            path, edm on the EDM path, epsilon elsewhere.
        betas: training betas of the "vp" path; None means the scaled-linear schedule of Stable Diffusion.
        num_classes: number of labels; a label of num_classes means none, which is the whole mixture.

    Raises:
        ValueError: for an unknown path or prediction type.
    """

    __module__ = "flowkit"

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        components: int = 1,
        path: str = "flow",
        prediction_type: str | None = None,
        betas: Sequence[float] | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.path: Path = paths.named(path, betas)
        natural = {"flow": "flow_prediction", "edm": "edm"}.get(path, "epsilon")
        self.prediction: str = prediction_type or natural
        predictions.pair(self.prediction, 1.0, 0.0)  # refuses an unknown type
        self.register_to_config(in_channels=shape[0], out_channels=shape[0], sample_size=shape[-1])
        self.means = torch.nn.Buffer(torch.zeros(components, *shape, dtype=torch.float64))
        self.variances = torch.nn.Buffer(torch.zeros(components, *shape, dtype=torch.float64))
        self.log_weights = torch.nn.Buffer(torch.zeros(components, dtype=torch.float64))
        self.labels = torch.nn.Buffer(torch.zeros(components, dtype=torch.int64))
        # A parameter, since pipelines ask a model for its dtype.
        self.unit = torch.nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    @classmethod
    def of(
        cls,
        means: Tensor,
        std: float | Tensor = 0.0,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        path: str = "flow",
        prediction_type: str | None = None,
        betas: Sequence[float] | None = None,
    ) -> MixtureDenoiser:
        """Builds the network of a mixture.

        Args:
            means: component means, shape (K, *shape).
            std: standard deviations, a number or a tensor that broadcasts to the means; 0 is a finite set.
            weights: component weights, shape (K,), positive, any sum; None means equal.
            labels: class of each component, shape (K,); None means no classes.
            path: name of the path.
            prediction_type: what the network returns; None means the path's own.
            betas: training betas of the "vp" path.

        Raises:
            ValueError: for shapes that do not fit, a negative std or a weight that is not positive.
        """
        count = len(means)
        for name, value in (("weights", weights), ("labels", labels)):
            if value is not None and value.shape != (count,):
                raise ValueError(f"{name} have shape {tuple(value.shape)} for {count} components; give one for each")
        if weights is not None and not (weights > 0).all():
            raise ValueError(f"mixture weights must be positive, got {weights.tolist()}")
        deviation = torch.as_tensor(std, dtype=torch.float64)
        if not (deviation >= 0).all():
            raise ValueError(f"a standard deviation must not be negative, got {std}")
        model: MixtureDenoiser = cls(
            shape=list(means.shape[1:]),
            components=count,
            path=path,
            prediction_type=prediction_type,
            betas=betas,
            num_classes=0 if labels is None else int(labels.max()) + 1,
        )
        model.means.copy_(means)
        model.variances.copy_(deviation.square().expand_as(model.means))
        if weights is not None:
            model.log_weights.copy_(weights.double().log())
        if labels is not None:
            model.labels.copy_(labels)
        return model

    def posterior(self, x: Tensor, s: float, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (E[x0 | x], E[eps | x]) in float64.

        Args:
            x: noisy samples in the path's coordinates, shape (B, *shape).
            s: flow time in [0, 1].
            class_labels: shape (B,), restricts each sample to the components of its label; num_classes or None: all of them.
        """
        alpha, sigma = self.path.alpha(s), self.path.sigma(s)
        centred = x.double().unsqueeze(1) - alpha * self.means
        total = (alpha**2 * self.variances + sigma**2).clamp_min(1e-300)
        logits = self.log_weights - 0.5 * (centred.square() / total + total.log()).flatten(2).sum(-1)
        if class_labels is not None:
            labels = class_labels.to(self.labels.device)[:, None]
            logits = logits.masked_fill((labels != self.labels) & (labels < self.config.num_classes), -torch.inf)
        share = logits.softmax(1).reshape(*logits.shape, *[1] * (x.ndim - 1))
        scaled = centred / total
        x0 = (share * (self.means + alpha * self.variances * scaled)).sum(1)
        return x0, sigma * (share * scaled).sum(1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Returns the exact prediction, ``A E[x0 | x] + B E[eps | x]``.

        Args:
            sample: network input, shape (B, *shape): the noisy sample, times c_in on the EDM path.
            timestep: the model's time, one for all samples.
            class_labels: shape (B,), or None.
            return_dict: whether to return an output object or a tuple.

        Returns:
            The prediction, shape of ``sample``, in its dtype.
        """
        s = self.path.at_time(float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep))
        x0, eps = self.posterior(sample.double() / self.path.input_scale(s), s, class_labels)
        a, b = predictions.pair(self.prediction, self.path.alpha(s), self.path.sigma(s), self.path.sigma_data)
        output = (a * x0 + b * eps).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)
