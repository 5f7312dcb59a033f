"""``nox -s bench -- attention-gpu-torch``: ``torch-ring`` on one NVIDIA GPU, against torch's own best.

It is made of parts; each is measured, shown and written by itself, and ``--only NAME`` runs one alone. How to read the
figures, and how to run it with a torch that is there already: ``docs/benchmarks/attention-gpu-torch.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import attention_gpu_torch_million
import attention_gpu_torch_packed
import attention_gpu_torch_ring
import attention_gpu_torch_step
import torch
from bench_result import add_output, hardware, load, output_target
from bench_torch_gpu import Part, Setting
from bench_torch_page import command, markdown_table, write_figures
from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.errors import LwmError, UnsupportedError, UsageError
from lwm_torch_ring.attention.options import AttentionOptions

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "attention-gpu-torch.json"
PARTS: dict[str, Part] = {
    part.name: part
    for module in (
        attention_gpu_torch_ring,
        attention_gpu_torch_packed,
        attention_gpu_torch_step,
        attention_gpu_torch_million,
    )
    for part in module.PARTS
}
HEAD = ["part", "figure", "aim", "device", "torch", "date"]


def arguments_of(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- attention-gpu-torch", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be given several times")
    kernels = get_args(AttentionOptions.model_fields["kernel"].annotation)
    parser.add_argument("--kernel", default="auto", choices=kernels, help="the plugin's kernel (default: its choice)")
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up (default 7)")
    add_output(parser, RESULT)
    return parser.parse_args(words)


def setting_of(given: argparse.Namespace, console: Console) -> Setting:
    """Where and how to run.

    Raises:
        UsageError: rounds that are none.
        UnsupportedError: no GPU, and no ``--smoke``.
    """
    if given.rounds is not None and given.rounds < 1:
        raise UsageError(f"attention-gpu-torch: --rounds {given.rounds}; expected 1 or more")
    if not given.smoke and not torch.cuda.is_available():
        raise UnsupportedError(
            f"attention-gpu-torch: needs an NVIDIA GPU, torch {torch.__version__} sees none; or give --smoke"
        )
    rounds = given.rounds or (1 if given.smoke else 7)
    device = torch.device("cpu" if given.smoke else "cuda")
    return Setting(device, given.smoke, given.kernel, rounds, console)


def about(setting: Setting) -> dict[str, Any]:
    """The machine, the device and the versions."""
    try:
        plugin = version("lwm-torch-ring")
    except PackageNotFoundError:  # run from the checkout by PYTHONPATH
        plugin = "the checkout's"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "lwm-torch-ring": plugin}
    device = "CPU"
    if setting.device.type == "cuda":
        device = torch.cuda.get_device_name(setting.device)
        versions |= {"cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version())}
    return {
        "date": date.today().isoformat(), "smoke": setting.small, "device": device, "hardware": hardware(),
        "load_before": load(), "versions": versions, "dtype": setting.dtype_name, "rounds": setting.rounds,
    }  # fmt: skip


def lines_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows, of all parts that there are figures of, in the order of :data:`PARTS`."""
    rows = []
    for name, part in PARTS.items():
        found = result["parts"].get(name)
        for figure in part.figures(found) if found else ():
            where = [found["device"], found["versions"]["torch"], found["date"]]
            rows.append([f"{name}, {figure.what}", figure.value, figure.aim, *where])
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The table for people."""
    table = Table(title=result["benchmark"], box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in HEAD[:3]:
        table.add_column(column)
    for row in lines_of(result):
        table.add_row(*(cell.replace("**", "") for cell in row[:3]))
    console.print(table)
    if any(found["smoke"] for found in result["parts"].values()):
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")


def page(result: dict[str, Any]) -> str:
    """The table and the commands for the benchmark's page."""
    commands = dict.fromkeys(found["command"] for found in result["parts"].values())
    return "\n\n".join([markdown_table(HEAD, lines_of(result)), *(f"`{words}`" for words in commands)])


def keep(target: Path, result: dict[str, Any], on_page: bool) -> None:
    """Write the parts of ``result`` into ``target``, beside those of other parts that are there."""
    whole = dict(result)
    if target.exists():
        whole["parts"] = json.loads(target.read_text(encoding="utf-8"))["parts"] | result["parts"]
    target.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if on_page:
        write_figures(target.with_suffix(".md"), page(whole))


def measured(part: Part, setting: Setting) -> tuple[Setting, dict[str, Any]]:
    """What a part finds in bfloat16, and in which setting; the small case goes through float32 first."""
    if setting.small:
        exact = replace(setting, dtype=torch.float32)
        part.kept(exact, part.measure(exact))
    short = replace(setting, dtype=torch.bfloat16)
    return short, {**about(short), **part.measure(short)}


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for, part by part; the exit code."""
    given, console = arguments_of(arguments), Console()
    result: dict[str, Any] = {"benchmark": "attention-gpu-torch", "parts": {}}
    try:
        target = output_target(given, RESULT)
        setting = setting_of(given, console)
        for name in given.only or PARTS:
            console.print(f"[dim]{name}: {PARTS[name].what}[/dim]", highlight=False)
            used, found = measured(PARTS[name], setting)
            result["parts"][name] = {"command": command(Path(__file__), arguments), **found}
            if target is not None:  # at once: what is measured stays, whatever becomes of the next part
                keep(target, result, given.write)
            else:
                show({**result, "parts": {name: result["parts"][name]}}, console)
            PARTS[name].kept(used, found)
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if target is not None:
        show(result, console)
        console.print(f"Written to {target}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
