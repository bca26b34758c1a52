"""Runs ours and the peer's, prints a table of ratios, and writes the figures as JSON."""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import beside, containers
from benchmarks.lm_server import lm_server
from benchmarks.ours import measure

RESULTS = Path(__file__).parent / "results"
MS, US, MB = 1e3, 1e6, 1e-6


def rows(ours: dict[str, float], peer: dict[str, float]) -> list[tuple[str, float, float | None, str, str]]:
    """What, ours, the peer's, unit, goal."""
    found: list[tuple[str, float, float | None, str, str]] = []
    for size in (1, 100, 1000):
        name = f"noop_{size}_mb_s"
        found.append(
            (f"no-op cell, {size} MB of context", ours[name] * MS, peer[name] * MS, "ms", "≤ 0.5 ms")
        )
        back = ours[f"noop_back_to_back_{size}_mb_s"] * MS
        found.append((f"no-op cell, {size} MB, no pause between cells", back, None, "ms", ""))
    speed, peers_speed = 100 / ours["context_100_mb_s"], 100 / peer["context_100_mb_s"]
    streamed = 100 / ours["context_100_mb_streamed_s"]
    overhead = ours["batch_200_s"] / ours["bare_batch_200_s"]
    found += [
        ("llm_query over the LM's own time", ours["query_s"] * MS, peer["query_s"] * MS, "ms", "≤ 0.8 ms"),
        ("200 batched", ours["batch_200_s"] * MS, peer["batch_200_s"] * MS, "ms", ""),
        ("200 batched / the bare SDK's", overhead, None, "×", "≤ 1.2 ×"),
        ("context in, 100 MB by file", speed, peers_speed, "MB/s", "≥ 1,000 MB/s"),
        ("context in, 100 MB streamed", streamed, None, "MB/s", "≥ 150 MB/s"),
        ("checkpoint (fork) at 1 GB", ours["checkpoint_1_gb_s"] * MS, None, "ms", "≤ 2 ms"),
        ("kill of a cell to the next one's end", ours["kill_to_usable_s"] * MS, None, "ms", "≤ 20 ms"),
        ("start to first cell", ours["start_s"] * MS, peer["start_s"] * MS, "ms", ""),
        ("further session to first cell", ours["further_session_s"] * MS, None, "ms", ""),
        ("own memory of an idle session", ours["session_bytes"] * MB, None, "MB", "≤ 15 MB"),
        ("log of 5 MB, 5 turns", ours["log_bytes"] * MB, peer["log_bytes"] * MB, "MB", "≤ 6 MB"),
    ]
    return found


def container_rows(
    ours: dict[str, dict[str, float]], peer: dict[str, float], bare: float
) -> list[tuple[str, list[float | None], str, str]]:
    """What, the figure of each environment and the peer's Docker, unit, goal."""
    goals = {1: "≤ 1.5 ms, ≥ 250×", 10: "≤ 1.5 ms", 100: "≤ 2 ms, ≥ 3,000×"}
    names: list[tuple[str, str, float, str, str]] = [
        (f"no-op cell, {size} MB of context", f"noop_{size}_mb_s", MS, "ms", goals[size])
        for size in (1, 10, 100)
    ]
    names += [
        ("llm_query over the LM's own time", "query_s", MS, "ms", "≤ 0.8 ms"),
        ("200 batched", "batch_200_s", MS, "ms", ""),
        ("200 batched / the bare SDK's", "batch_ratio", 1.0, "×", "≤ 1.2"),
        ("context in, 100 MB by file", "context_100_mb_s", MS, "ms", "≤ 100 ms: 1,000 MB/s"),
        ("context in, 100 MB streamed", "context_100_mb_streamed_s", MS, "ms", "≤ 667 ms: 150 MB/s"),
        (
            "start to first cell",
            "start_s",
            MS,
            "ms",
            f"≤ {1.25 * bare * MS:.0f} ms: 1.25 × docker run … true",
        ),
        ("claim of a warm one to first cell", "claim_s", MS, "ms", "≤ 10 ms"),
        ("memory of a sandbox", "sandbox_bytes", MB, "MB", ""),
    ]
    found: list[tuple[str, list[float | None], str, str]] = []
    for what, key, scale, unit, goal in names:
        figures = [each.get(key) for each in (*ours.values(), peer)]
        found.append((what, [None if one is None else one * scale for one in figures], unit, goal))
    return found


def run_peer(python: str, *arguments: str) -> dict[str, float]:
    command = [python, str(Path(__file__).parent / "peer.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"the peer failed:\n{run.stderr}")
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def local(python: str, base_url: str) -> dict[str, Any]:
    ours = asyncio.run(measure(base_url))
    peer = run_peer(python, base_url)
    table = Table("local", "ours", "rlms 0.1.3", "rlms / ours", "goal")
    for name, mine, its, unit, goal in rows(ours, peer):
        ratio = f"{its / mine:,.2f}" if its is not None else ""
        table.add_row(name, f"{mine:,.2f} {unit}", "" if its is None else f"{its:,.2f} {unit}", ratio, goal)
    Console(width=120).print(table)
    return {"ours": ours, "rlms": peer}


def isolated(python: str, base_url: str) -> dict[str, Any]:
    ours = {name: asyncio.run(containers.measure(name, base_url)) for name in containers.ENVIRONMENTS}
    bare = containers.bare_run()
    image = containers.peer_image()
    peer = run_peer(python, base_url, image)
    my_noops, its_noops = asyncio.run(beside.noops(python, base_url, image))
    ours["docker"] |= my_noops
    peer |= its_noops
    table = Table("isolated", *ours, "rlms 0.1.3 docker", "rlms / docker", "goal")
    for name, figures, unit, goal in container_rows(ours, peer, bare):
        shown = ["" if one is None else f"{one:,.2f} {unit}" for one in figures]
        ratio = f"{figures[-1] / figures[0]:,.1f}" if figures[0] and figures[-1] else ""
        table.add_row(name, *shown, ratio, goal)
    Console(width=150).print(table)
    return {"ours": ours, "rlms": peer, "bare_docker_run_s": bare}


def cloud(python: str, base_url: str) -> dict[str, Any]:
    """Of ours only: rlms does not work with today's SDK."""
    from benchmarks import clouds

    found = clouds.figures(base_url)
    table = Table("cloud environments, on loopback", *found, "goal")
    for what, key, scale, unit, goal in (
        ("8 calls of 1 s at once", "eight_calls_s", 1.0, "s", "≤ 1.1 s"),
        ("llm_query over the LM's own time", "query_s", MS, "ms", "≤ 5 ms"),
        ("200 batched / the bare SDK's", "batch_ratio", 1.0, "×", ""),
        ("context in, 50 MB", "context_50_mb_s", 1.0, "s", "≤ 2.5 s: 20 MB/s"),
        ("start", "start_s", 1.0, "s", ""),
    ):
        table.add_row(what, *(f"{each[key] * scale:,.2f} {unit}" for each in found.values()), goal)
    Console(width=120).print(table)
    return found


def calls(python: str, base_url: str) -> dict[str, float]:
    """Of ours only, beside the bare SDK."""
    from benchmarks.calls import figures

    found = figures()
    table = Table("calls to an LM that takes its time", "", "goal")
    table.add_row("1,000 calls of 100 ms, 100 at once: the bare SDK", f"{found['bare_1000_s']:.2f} s", "")
    table.add_row("the same by llm_query_batched", f"{found['ours_1000_s']:.2f} s", "")
    table.add_row("ratio", f"{found['ratio']:.2f} ×", "≤ 1.15")
    table.add_row("8 calls of 1 s at once", f"{found['eight_calls_s']:.2f} s", "≤ 1.1 s")
    Console(width=120).print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--peer", required=True, help="Python interpreter with rlms installed.")
    parser.add_argument("--only", choices=["local", "isolated", "calls", "cloud"], help="Measure a part.")
    arguments = parser.parse_args()
    parts = {"local": local, "isolated": isolated, "calls": calls, "cloud": cloud}
    with lm_server() as base_url:
        figures = {
            name: part(arguments.peer, base_url)
            for name, part in parts.items()
            if arguments.only in (None, name)
        }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    path.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
