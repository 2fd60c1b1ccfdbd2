"""What a distillation of Stable Diffusion 1.5 at 512 x 512 costs, by two rates that the authors of InstaFlow published.

    python benchmarks/distill_cost.py

Rates: the model card of InstaFlow (arXiv 2309.06380) gives the A100-days of its stages, whose rows (batch times updates) and pairs
are known, so that a row of training and a pair of the teacher have a price. All weights are trained; adapters take less.
"""

from __future__ import annotations

DAY = 86_400  # seconds
# Stage: (A100-days, batch, updates).
STAGES = {
    "reflow, first part": (11.2, 64, 70_000),
    "reflow, second part": (64.0, 1024, 25_000),
    "one step, L2": (54.4, 1024, 21_500),
    "one step, LPIPS": (53.6, 1024, 18_000),
}
PAIRS = (16.0, 1_600_000, 25)  # A100-days, pairs, steps of the teacher with guidance, two rows each
LATENT = 4 * 64 * 64 * 2  # bytes in half precision; a pair keeps two
# Settings: (pairs, steps of the teacher, rows of an update, updates).
EXAMPLES = {
    "`examples/distill_text_to_image.yaml`": (20_000, 25, 128, 5_000),
    "Rectified Diffusion where it passes 2-rectified flow (arXiv 2410.07303)": (1_600_000, 25, 128, 20_000),
    "Rectified Diffusion in full": (1_600_000, 25, 128, 200_000),
}


def per_row() -> float:
    """A100-seconds of a row of an update without LPIPS: the mean over the stages, by rows."""
    plain = [stage for name, stage in STAGES.items() if "LPIPS" not in name]
    return sum(days for days, _, _ in plain) * DAY / sum(batch * updates for _, batch, updates in plain)


def per_step() -> float:
    """A100-seconds of a guided step of the teacher, for one sample."""
    days, pairs, steps = PAIRS
    return days * DAY / (pairs * steps)


def hours(pairs: int, steps: int, batch: int, updates: int) -> tuple[float, float]:
    """A100-hours of the teacher's samples and of the updates."""
    return per_step() * pairs * steps / 3600, per_row() * batch * updates / 3600


def main() -> None:
    """Prints both tables."""
    print("| stage of InstaFlow | A100-days | rows | A100-seconds a row |\n| --- | ---: | ---: | ---: |")
    for name, (days, batch, updates) in STAGES.items():
        print(f"| {name} | {days:g} | {batch:,} x {updates:,} | {days * DAY / (batch * updates):.3f} |")
    print(f"\nA guided step of the teacher: {per_step():.3f} A100-seconds a sample.\n")
    print("| run | teacher, A100-hours | updates, A100-hours | pairs on the disk |\n| --- | ---: | ---: | ---: |")
    for name, (pairs, steps, batch, updates) in EXAMPLES.items():
        drawn, trained = hours(pairs, steps, batch, updates)
        print(f"| {name} | {drawn:,.0f} | {trained:,.0f} | {2 * LATENT * pairs / 1e9:,.1f} GB |")


if __name__ == "__main__":
    main()
