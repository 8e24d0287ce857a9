"""The other side of benchmarks.speed.cpu: diffusers on PyTorch, in an environment of its own (we need neither).

    python -m venv torch-env && torch-env/bin/pip install torch diffusers
    python -m benchmarks.speed.cpu --other-python=torch-env/bin/python    # both, run by run in turn
    torch-env/bin/python -m benchmarks.speed.cpu_diffusers > other.json   # or alone, for --other=other.json

Random weights, float32, no gradients, PyTorch's default number of threads.
"""

import argparse
import json
import statistics
import sys

import diffusers  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.speed.cpu_cases import CASES, Runner, TransformerCase, VaeCase, seconds, serve


def make(name: str) -> Runner:
    """Builds a case; the returned function runs it once."""
    case = CASES[name]
    torch.manual_seed(0)
    return _transformer(case) if isinstance(case, TransformerCase) else _vae(case)


def about() -> dict:
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"name": "diffusers", "versions": versions, "threads": torch.get_num_threads()}


def _transformer(case: TransformerCase) -> Runner:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=case.num_heads,
        attention_head_dim=case.dim // case.num_heads,
        text_dim=case.text_dim,
        ffn_dim=case.ffn_dim,
        num_layers=case.num_layers,
    ).eval()
    frames, rows, columns, channels = case.latents
    inputs = (
        torch.randn(1, channels, frames, rows, columns),
        torch.tensor([500.0]),
        torch.randn(1, case.text_len, case.text_dim),
    )
    return lambda: _without_gradients(lambda: model(*inputs))


def _vae(case: VaeCase) -> Runner:
    model = diffusers.AutoencoderKLWan().eval()
    frames, rows, columns, channels = case.latents
    latents = torch.randn(1, channels, frames, rows, columns)
    return lambda: _without_gradients(lambda: model.decode(latents))


def _without_gradients(function) -> None:
    with torch.no_grad():
        function()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.cpu_diffusers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each case")
    parser.add_argument(
        "--serve", action="store_true", help="take orders on standard input (benchmarks.speed.cpu does this)"
    )
    arguments = parser.parse_args()
    if arguments.serve:
        # Whatever a library prints goes to standard error: standard output carries the answers.
        answers, sys.stdout = sys.stdout, sys.stderr
        serve(make, about(), sys.stdin, answers)
        return
    results = {}
    for name in arguments.cases:
        run = make(name)
        run()
        timed = [seconds(run) for _ in range(arguments.rounds)]
        results[name] = {key: statistics.median(t[key] for t in timed) for key in timed[0]}
        results[name]["runs"] = [t["seconds"] for t in timed]
    json.dump({**about(), "cases": results}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
