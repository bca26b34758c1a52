"""Generate rlm_agent/rpc/v1 from the .proto files; with --check, fail when what is committed is stale.

Needs grpcio-tools 1.76.0: code from newer tools refuses protobuf 6.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent
OUT = PROTO.parent / "sandbox_images"
SOURCES = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))


def generate(out: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--proto_path={PROTO}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *SOURCES,
        ],
        check=True,
        # protoc finds its plugins (protoc-gen-mypy) on PATH: look beside this interpreter first.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )


def stale() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.py*")}
    return [
        str(name)
        for name, text in fresh.items()
        if not (OUT / name).exists() or (OUT / name).read_bytes() != text
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        if changed := stale():
            sys.exit(f"generated code is not current: {', '.join(changed)}; run `make proto`")
    else:
        generate(OUT)
