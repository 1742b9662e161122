"""Frozen encoders: which columns a pretrained CLIP and VAE write, and what their weights' identity is.

Legend: B batch, H W pixels, D embedding width, W text width, T tokens of one caption, C latent channels, h w latent size.
A folder never touches the network; a hub name does when its weights are not in the local cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import storage
from data.errors import UserError
from training.pixels import preprocessed, to_uint8, to_unit_range

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = "open_clip_model.safetensors"
VAE_CONFIG = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ClipEncoder:
    """A frozen open_clip model with its tokenizer and its own preprocessing."""

    model: nn.Module
    tokenizer: Any
    preprocess: dict[str, Any]
    """open_clip's `PreprocessCfg` fields: size, mean, std, interpolation, resize_mode, fill_color."""

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> ClipEncoder:
        """The encoder of `source`: an open_clip `MODEL/TAG`, or a folder in open_clip's local-dir form.

        Raises UserError when the folder is incomplete, the name is unknown, or its weights cannot be downloaded.
        """
        folder = _folder(source)
        model = _clip_from_hub(source) if folder is None else _clip_from_folder(folder)
        return cls(model.eval().requires_grad_(False).to(device), _tokenizer(model), _preprocess(model))

    @property
    def embed_dim(self) -> int:
        """D, the width of both embeddings."""
        projection = _text_tower(self.model).text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def text_width(self) -> int:
        """W, the width of the text hidden states."""
        return _text_tower(self.model).token_embedding.embedding_dim

    @property
    def context_length(self) -> int:
        """The most tokens that a caption can have, start and end included."""
        return self.tokenizer.context_length

    @property
    def image_size(self) -> int:
        """Side of the images that the network sees, in pixels."""
        return int(self.preprocess["size"])

    @torch.inference_mode()
    def image(self, pixels: Tensor) -> Tensor:
        """Image embeddings (B, D) float32, L2-normalised, of `pixels` (B, 3, H, W) uint8 of any size."""
        _require_uint8(pixels)
        return self.model.encode_image(
            preprocessed(pixels.to(self._device), self.preprocess), normalize=True
        ).float()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Text embeddings (B, D) float32, L2-normalised, and per caption the last hidden states (T, W) float32.

        The states come after the final norm and run from the start token to the end token. Longer captions are cut to
        `context_length` tokens, the last of which is the end token.
        """
        tokens = self.tokenizer(list(captions)).to(self._device)
        captured: list[Tensor] = []
        hook = _text_tower(self.model).ln_final.register_forward_hook(
            lambda _m, _i, out: captured.append(out)
        )
        try:
            embeddings = self.model.encode_text(tokens, normalize=True).float()
        finally:
            hook.remove()
        lengths = (tokens == self.tokenizer.eot_token_id).int().argmax(1) + 1
        states = captured[0].float()
        return embeddings, [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class VaeEncoder:
    """A frozen diffusers `AutoencoderKL`."""

    vae: Any

    @classmethod
    def load(cls, source: str, device: str | torch.device = "cpu") -> VaeEncoder:
        """The VAE of `source`: a diffusers folder (also a pipeline's, with a `vae` sub-folder) or a hub name.

        Raises UserError when the folder is incomplete or the hub's weights cannot be downloaded.
        """
        from diffusers import AutoencoderKL

        folder = _vae_folder(source)
        if folder is not None and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder} has no *.safetensors weights beside its {VAE_CONFIG}: give a complete diffusers VAE folder"
            )
        try:
            vae = AutoencoderKL.from_pretrained(
                folder or source,
                local_files_only=folder is not None,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # the other way needs `accelerate`
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no VAE can be loaded from {source!r}: give a diffusers folder, or on a machine "
                f"with a network download {VAE_CONFIG} and diffusion_pytorch_model.safetensors of that hub repository into "
                "one folder, copy it here and give its path"
            ) from error
        return cls(vae.eval().requires_grad_(False).to(device))

    @property
    def scaling_factor(self) -> float:
        """What unscaled latents are multiplied by so that their standard deviation is about 1."""
        return float(self.vae.config.scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Posterior moments (B, 2C, h, w) float32, mean then log-variance, unscaled, of (B, 3, H, W) uint8 pixels."""
        _require_uint8(pixels)
        return self.vae.encode(to_unit_range(pixels.to(self.vae.device))).latent_dist.parameters.float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 of unscaled `latents` (B, C, h, w) float32."""
        return to_uint8(self.vae.decode(latents.to(self.vae.device), return_dict=False)[0])


def weights_digest(kind: str, source: str) -> str:
    """SHA-256 that identifies the encoder `kind` ("clip" or "vae") at `source`.

    Of a folder: over names and contents of its weights and config, so that a copy has the same digest. Of a hub name:
    over the name, since planning downloads nothing. Raises UserError when a folder is incomplete.
    """
    folder = _vae_folder(source) if kind == "vae" else _folder(source)
    if folder is None:
        return hashlib.sha256(f"{kind}:{source}".encode()).hexdigest()
    config = VAE_CONFIG if kind == "vae" else CLIP_CONFIG
    _require_config(folder, config)
    names = sorted(p.name for p in folder.iterdir() if p.name == config or p.suffix in _WEIGHT_SUFFIXES)
    lines = [f"{name} {storage.sha256(str(folder / name))[1]}" for name in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _folder(source: str) -> Path | None:
    path = Path(source.removeprefix("file://")).expanduser()
    return path if path.is_dir() else None


def _vae_folder(source: str) -> Path | None:
    folder = _folder(source)
    if folder is None:
        return None
    folder = folder / "vae" if (folder / "vae" / VAE_CONFIG).is_file() else folder
    _require_config(folder, VAE_CONFIG)
    return folder


def _require_config(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: give a folder that holds it together with the weights")


def _clip_from_folder(folder: Path) -> nn.Module:
    import open_clip

    _require_config(folder, CLIP_CONFIG)
    if not any(p.suffix in _WEIGHT_SUFFIXES for p in folder.iterdir()):
        raise UserError(f"{folder} has no weights beside its {CLIP_CONFIG}: copy {CLIP_WEIGHTS} there")
    _require_own_text_tower(
        json.loads((folder / CLIP_CONFIG).read_text())["model_cfg"]["text_cfg"], str(folder)
    )
    return open_clip.create_model(f"local-dir:{folder}")


def _clip_from_hub(source: str) -> nn.Module:
    import open_clip

    model, _, tag = source.rpartition("/")
    if tag not in open_clip.list_pretrained_tags_by_model(model):
        raise UserError(
            f"{source!r} is neither a folder nor a MODEL/TAG that open_clip knows: give a folder with {CLIP_CONFIG} and "
            "weights, or a name such as ViT-L-14/openai"
        )
    _require_own_text_tower(open_clip.get_model_config(model)["text_cfg"], source)
    try:
        return open_clip.create_model(model, pretrained=tag)
    except (RuntimeError, OSError) as error:
        repository = open_clip.get_pretrained_cfg(model, tag).get("hf_hub", source).rstrip("/")
        raise UserError(
            f"the weights of {source} cannot be downloaded: on a machine with a network download "
            f"{CLIP_CONFIG} and {CLIP_WEIGHTS} of the hub repository {repository} into one folder, copy it here and give "
            "its path"
        ) from error


def _require_own_text_tower(text_cfg: dict[str, Any], source: str) -> None:
    if "hf_model_name" in text_cfg or "hf_tokenizer_name" in text_cfg:
        raise UserError(
            f"{source} needs a Hugging Face text tower or tokenizer; choose a CLIP with open_clip's own, such as ViT-L-14"
        )


def _tokenizer(model: nn.Module) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    length = _text_tower(model).positional_embedding.shape[0]
    return SimpleTokenizer(context_length=length)


def _preprocess(model: nn.Module) -> dict[str, Any]:
    preprocess = dict(model.visual.preprocess_cfg)
    size = preprocess["size"]
    return {**preprocess, "size": size[0] if isinstance(size, list | tuple) else size}


def _text_tower(model: nn.Module) -> Any:
    return model if hasattr(model, "token_embedding") else model.text


def _require_uint8(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}; encoders take uint8 (B, 3, H, W)")
