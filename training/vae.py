"""The VAE: 8x smaller, 32 channels, trained on drawings.

python -m training.vae --out runs/nano --seconds 150
python -m training.vae --out runs/nano --start klein/nano/model --seconds 90

With --start only the decoder goes on learning, so that every latent stays what it was.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2

from training.attributes import Batch, part, sample
from training.demos import CHARACTER, STYLE, demo_pictures
from training.draw import LOOKS, draw, pencil, with_looks
from training.model import build_vae, save_part
from training.sheet import save_sheet
from training.steps import (
    Clock,
    Step,
    autocast,
    cosine,
    make_optimizer,
    pick_device,
    report,
    save_atomically,
)


def draw_bank(values: Batch, seed: int, width: int = 256, height: int = 256) -> torch.Tensor:
    """Draw all portraits of a batch, (N, 3, height, width) uint8 on the training device."""
    device, parts = pick_device(), []
    for start in range(0, len(values["who"]), 128):
        image = draw(part(values, start, 128), seed + start, width, height, device)
        parts.append((image * 255).round().byte())
    return torch.cat(parts)


def to_model(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to -1..1, channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, H, W) to 2x2 patches (N, 4C, H/2, W/2), in the pipeline's channel order."""
    count, channels, height, width = latents.shape
    split = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(count, channels * 4, height // 2, width // 2)


def crops(pictures: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """Random square crops (count, 3, side, side) of pictures (N, 3, H, W)."""
    device = pictures.device
    pick = torch.randint(len(pictures), (count, 1, 1), device=device)
    place = torch.arange(side, device=device)
    top = torch.randint(pictures.shape[2] - side + 1, (count, 1), device=device) + place
    left = torch.randint(pictures.shape[3] - side + 1, (count, 1), device=device) + place
    return pictures[pick, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor, size: int = 256) -> torch.Tensor:
    """Encode uint8 pictures to normalised patches (N, 128, H/16, W/16), float32."""
    parts = []
    with torch.no_grad(), autocast(pictures.device):
        for chunk in pictures.split(size):
            parts.append(patchify(vae.encode(to_model(chunk)).latent_dist.mode().float()))
    patches = torch.cat(parts)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    spread = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (patches - mean) / spread


@torch.no_grad()
def fill_statistics(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> None:
    """Set the batch norm's running mean and variance from encoded pictures."""
    vae.bn.running_mean.zero_()
    vae.bn.running_var.fill_(1 - vae.config.batch_norm_eps)
    patches = encode(vae, pictures)
    variance, mean = torch.var_mean(patches.double(), dim=(0, 2, 3))
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance)
    vae.bn.num_batches_tracked.fill_(1)


@torch.no_grad()
def quality(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean PSNR in dB over uint8 pictures, and the reconstructions (N, 3, H, W) in 0..1."""
    parts = []
    for chunk in pictures.split(32):
        decoded = vae.decode(vae.encode(to_model(chunk)).latent_dist.mode()).sample
        parts.append((decoded.float().clamp(-1, 1) + 1) / 2)
    result = torch.cat(parts)
    error = (result - pictures.float() / 255).square().mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).mean().item(), result


def train(
    vae: AutoencoderKLFlux2,
    pictures: torch.Tensor,
    seconds: float,
    size: int,
    save: Path,
    rate: float = 1.5e-3,
) -> None:
    """Train on uint8 pictures; keeps a checkpoint at `save` and goes on from one found there."""
    device = pictures.device
    vae.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer([weight for weight in vae.parameters() if weight.requires_grad])
    clock = Clock(seconds)
    if save.exists():
        state = torch.load(save, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        clock = Clock(seconds, state["spent"], state["step"])

    def loss(count: int, side: int) -> torch.Tensor:
        wanted = to_model(crops(pictures, count, side))
        with autocast(device):
            posterior = vae.encode(wanted).latent_dist
            noise = torch.randn_like(posterior.mean)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - wanted
        moments = posterior.mean.float().square() + posterior.var.float() - 1
        kl = 0.5 * (moments - posterior.logvar.float()).mean()
        return error.abs().mean() + 2 * error.square().mean() + 2e-4 * kl

    small = Step(lambda: loss(size, 128), optimizer, after=lambda: None)
    whole = Step(lambda: loss(size // 2, 256), optimizer, after=lambda: None)
    for progress in clock.ticks():
        value = (small if progress < 0.75 else whole)(cosine(progress, rate))
        if clock.step % 100 == 0:
            report("vae", clock, loss=value.item())
        if clock.step % 1000 == 999:
            keep = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**keep, "spent": clock.spent, "step": clock.step}, save)


def training_pictures(count: int) -> torch.Tensor:
    """Drawings, demo subjects, pencil drawings and the looks of second references, uint8."""
    device = pick_device()
    plain = draw_bank(sample(count, 31), 31)
    bank, few = [plain], count // 12
    for kind in (CHARACTER, STYLE):
        extra, _ = demo_pictures(kind, few, 32, device)
        bank.append((extra * 255).round().byte().to(device))
    some = plain[:few].float() / 255
    looks = torch.arange(few, device=device) % (len(LOOKS) - 1) + 1
    bank += [(made * 255).round().byte() for made in (pencil(some), with_looks(some, looks))]
    return torch.cat(bank)


def main() -> None:
    """Draw, train, fill in the batch norm, measure, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of the model whose decoder to train")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(2)
    bank = training_pictures(args.pictures)
    if args.start:
        vae = AutoencoderKLFlux2.from_pretrained(args.start / "vae", dtype=torch.float32)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = build_vae()
    checkpoint = args.out / "checkpoints/vae.pt"
    train(vae, bank, args.seconds, args.batch, checkpoint, args.rate)
    vae.eval().to(torch.bfloat16).to(torch.float32)
    if not args.start:
        fill_statistics(vae, bank[: args.pictures])
    test = draw_bank(sample(min(256, args.pictures), 999), 999)
    decibels, decoded = quality(vae, test)
    print(f"vae PSNR {decibels:.2f} dB on {len(test)} new drawings")
    sketches = (pencil(test.float() / 255) * 255).round().byte().contiguous()
    print(f"vae PSNR {quality(vae, sketches)[0]:.2f} dB on them as pencil drawings", flush=True)
    pairs = torch.cat([test[:8].float().cpu() / 255, decoded[:8].cpu()])
    save_sheet(pairs, args.out / "sheets/vae.png")
    vae.to("cpu", torch.bfloat16, memory_format=torch.contiguous_format)
    save_part(vae, args.out / "vae")


if __name__ == "__main__":
    main()
