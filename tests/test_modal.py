"""environment="modal": the real SDK, unchanged, against a service of ours on loopback."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import modal.exception as modal_sdk
import pytest
import trustme
from modal_proto import api_pb2
from rlm_environments import modal as modal_environment
from rlm_environments.modal import ModalEnvironment, ModalSandbox

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import make_environment
from rlm_core.errors import ConfigError, EngineError, PolicyNotEnforceable, RLMError, SandboxLost
from rlm_core.session import Session
from tests.conftest import Recorder, echo
from tests.fakes.fixtures import lead_to_modal
from tests.fakes.machines import Containers
from tests.fakes.modal.service import FakeModal
from tests.support.clouds import (
    ends_at_ctrl_c,
    reaped_by_command,
    run_the_snippet_of,
    what_the_doctor_says_of,
)
from tests.support.tls import https_server

pytestmark = [pytest.mark.needs("docker"), pytest.mark.usefixtures("modal")]
WAYS = pytest.mark.parametrize("transport", ["h2", "stdio"])
api: Any = api_pb2


def environment(**kwargs: Any) -> ModalEnvironment:
    made = make_environment("modal", {"memory": "1GiB", "lease": 3.0, **kwargs})
    assert isinstance(made, ModalEnvironment)
    return made


@contextlib.asynccontextmanager
async def started(**kwargs: Any) -> AsyncIterator[ModalSandbox]:
    sandbox = await environment(**kwargs).start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


def box_of(modal: FakeModal, sandbox: ModalSandbox) -> Any:
    assert sandbox._box is not None
    return modal.boxes[sandbox._box.object_id]


@WAYS
async def test_no_call_is_lost_or_made_twice_when_the_way_to_the_agent_breaks(
    modal: FakeModal, transport: str
) -> None:
    asked: list[str] = []

    async def answer(call: Call) -> Answer | Failure:
        asked.append(call.prompt)
        if len(asked) in (20, 150, 300):
            modal.drop_streams()
            modal.drop_tunnels()
        return await echo(call)

    async with started(transport=transport) as sandbox:
        async with Session(sandbox, sandbox._spec, answer) as session:
            code = "for n in range(400): r = llm_query(str(n)); print(r == f'echo {n}', end=' ')"
            assert (await session.execute(code)).stdout == "True " * 400
    assert asked == [str(n) for n in range(400)]


async def test_tokens_that_expire_are_renewed(modal: FakeModal) -> None:
    async with started(transport="stdio") as sandbox:
        async with Session(sandbox, sandbox._spec, echo) as session:
            modal.expire_tokens()
            await session.put_context("x" * 1_000_000)
            assert (await session.execute("print(len(context))")).stdout == "1000000\n"


@WAYS
@pytest.mark.parametrize("how", ["TERMINATED", "TIMEOUT"])
async def test_a_sandbox_that_the_service_ends_under_a_cell_is_one_clear_line(
    modal: FakeModal, recorder: Recorder, transport: str, how: str
) -> None:
    async with started(transport=transport) as sandbox:
        async with Session(sandbox, sandbox._spec, echo, observer=recorder) as session:
            cell = asyncio.ensure_future(session.execute("print('on')\nimport time; time.sleep(600)"))
            await recorder.saw("on")
            status = getattr(api.GenericResult, f"GENERIC_STATUS_{how}")
            await asyncio.to_thread(modal.terminate, box_of(modal, sandbox).id, status)
            with pytest.raises(SandboxLost, match="the sandbox at Modal has ended") as caught:
                await cell
    assert "\n" not in str(caught.value)


async def test_a_request_that_is_told_to_wait_is_made_again(modal: FakeModal) -> None:
    modal.throttle_next = [0.3, 0.3]
    async with started() as sandbox:
        assert await sandbox.epitaph() == ""
    assert modal.requests.count("SandboxCreateV2") == 3


async def test_a_request_that_is_told_to_wait_for_long_can_be_given_up(modal: FakeModal) -> None:
    modal.throttle_next = [600.0]
    before = set(modal.boxes)
    start = asyncio.ensure_future(environment().start())
    async with asyncio.timeout(30):
        while "SandboxCreateV2" not in modal.requests:  # noqa: ASYNC110 - the service is in another thread
            await asyncio.sleep(0.01)
    start.cancel()
    await asyncio.wait([start])
    assert start.cancelled() and set(modal.boxes) == before


REFUSALS = [
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit is reached"),
    (grpc.StatusCode.INVALID_ARGUMENT, "Modal refused: no such region"),
    (grpc.StatusCode.UNAUTHENTICATED, "MODAL_TOKEN_ID"),
]


@pytest.mark.parametrize(("status", "message"), REFUSALS)
async def test_a_refusal_is_one_clear_line(modal: FakeModal, status: grpc.StatusCode, message: str) -> None:
    modal.refuse_next = [(status, "no such region")]
    with pytest.raises(RLMError, match=message) as caught:
        await environment().start()
    assert "\n" not in str(caught.value)


async def test_without_a_token_it_says_which_variables_mend_it() -> None:
    program = "import asyncio\nfrom rlm_core.environment import make_environment\nasyncio.run(make_environment('modal', {}).start())"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_TOKEN")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stderr=subprocess.PIPE, env=env
    )
    _, errors = await process.communicate()
    assert "set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, or run: modal token new" in errors.decode()


VARIABLES = """
import glob, os
found = {name for name in os.environ if "MODAL" in name}
for path in glob.glob("/proc/[0-9]*/environ"):
    try: found |= {each for each in open(path, "rb").read().split(b"\\0") if b"MODAL" in each}
    except OSError: pass
print(found)
"""


async def test_what_is_asked_of_modal(modal: FakeModal) -> None:
    """The sandbox reaches nobody, and the only port is that of the tunnel; or there is none at all."""
    asked = {"cpus": 1.5, "memory": "1GiB", "region": "us-east", "tags": {"team": "ours"}}
    async with started(**asked, inbound_cidr_allowlist=["203.0.113.0/24"]) as sandbox:
        box = box_of(modal, sandbox)
        found = box.definition
        assert found.network_access.network_access_type == api.NetworkAccess.ALLOWLIST
        assert not found.network_access.allowed_cidrs and not found.network_access.allowed_domains
        assert [(each.port, each.tunnel_type) for each in found.open_ports.ports] == [
            (50_051, api.TUNNEL_TYPE_H2)
        ]
        assert list(found.inbound_cidr_allowlist) == ["203.0.113.0/24"]
        resources = found.resources
        assert (resources.milli_cpu, resources.milli_cpu_max) == (1500, 1500)
        assert (resources.memory_mb, resources.memory_mb_max) == (1024, 1024 + 512)
        assert list(found.scheduler_placement.regions) == ["us-east"]
        assert found.idle_timeout_secs == 10 and found.timeout_secs == 24 * 3600
        assert box.tags["team"] == "ours" and box.tags["rlm-sandbox"] == sandbox.id
        assert not found.secret_ids and sandbox.token not in str(found)
        async with Session(sandbox, sandbox._spec, echo) as session:
            assert (await session.execute(VARIABLES)).stdout == "set()\n"
    async with started(transport="stdio") as sandbox:
        found = box_of(modal, sandbox).definition
        assert found.network_access.network_access_type == api.NetworkAccess.BLOCKED
        assert not found.open_ports.ports


async def test_secrets_and_volumes_are_named(modal: FakeModal) -> None:
    async with started(secrets=["known"], volumes={"/data": "known"}) as sandbox:
        assert "st-known" in [each.secret_id for each in box_of(modal, sandbox).secret_sources]
        (volume,) = box_of(modal, sandbox).definition.volume_mounts
        assert (volume.volume_id, volume.mount_path, volume.read_only) == ("vo-known", "/data", True)
        async with Session(sandbox, sandbox._spec, echo) as session:
            assert (await session.execute("import os; print(os.environ['KNOWN_SECRET'])")).stdout == "42\n"
    with pytest.raises(EngineError, match="Secret 'unknown' not found"):
        await environment(secrets=["unknown"]).start()


async def test_a_gpu_is_asked_of_the_first_version_of_the_service(modal: FakeModal) -> None:
    async with started(gpu="T4") as sandbox:
        assert box_of(modal, sandbox).definition.resources.gpu_config.gpu_type == "T4"
        assert "SandboxCreate" in modal.requests and "SandboxCreateV2" not in modal.requests
        async with Session(sandbox, sandbox._spec, echo) as session:
            assert (await session.execute("print(llm_query('on'))")).stdout == "echo on\n"
        listed = {each.id for each in await environment().running()}
        assert sandbox.id in listed


def test_what_it_can_not_hold_is_refused() -> None:
    for field, value in (("runtime", "runsc"), ("disk", "1GiB"), ("pids", 64)):
        with pytest.raises(PolicyNotEnforceable, match=field):
            environment(**{field: value})
    with pytest.raises(ConfigError, match="transport"):
        environment(transport="http")
    with pytest.raises(ConfigError, match="inbound_cidr_allowlist"):  # to Modal it would be: from anywhere
        environment(inbound_cidr_allowlist=[])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"transport": "stdio", "network": "full"}, "without a network"),
        ({"transport": "stdio", "inbound_cidr_allowlist": ["0.0.0.0/0"]}, "has none"),
        ({"lifetime": 86_000}, "at most 85800 s"),
        ({"tags": {"rlm-sandbox": "x"}}, "are ours"),
        ({"image": "debian"}, "public image"),
        ({"secrets": ["no/such name"]}, "Modal refused"),
        ({"volumes": {"not-a-path": "known"}}, "mount below"),
        ({"image": "im-0123456789"}, "not found"),
    ],
)
async def test_what_does_not_fit_together_is_one_line(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RLMError, match=message) as caught:
        await environment(**kwargs).start()
    assert "\n" not in str(caught.value)


async def test_a_start_that_is_cancelled_while_the_request_is_on_its_way_leaves_nothing(
    modal: FakeModal,
) -> None:
    def running() -> set[str]:
        return {each.id for each in modal.boxes.values() if each.runs}

    before, known = running(), len(modal.boxes)
    modal.create_seconds = 0.5
    start = asyncio.ensure_future(environment().start())
    async with asyncio.timeout(30):
        while "SandboxCreateV2" not in modal.requests:  # noqa: ASYNC110 - the service is in another thread
            await asyncio.sleep(0.01)
    start.cancel()
    await asyncio.wait([start])
    modal.create_seconds = 0.0
    assert start.cancelled()
    assert len(modal.boxes) > known and running() == before


async def test_what_is_made_of_a_request_that_was_given_up_is_found_and_ended(
    modal: FakeModal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_environment, "UNKNOWN_SECONDS", 0.1)
    before, known = {each.id for each in modal.boxes.values() if each.runs}, len(modal.boxes)
    modal.create_seconds = 2.0
    start = asyncio.ensure_future(environment().start())
    async with asyncio.timeout(30):
        while "SandboxCreateV2" not in modal.requests:  # noqa: ASYNC110 - the service is in another thread
            await asyncio.sleep(0.01)
    start.cancel()
    await asyncio.wait([start])
    modal.create_seconds = 0.0
    assert start.cancelled() and len(modal.boxes) == known + 1
    assert {each.id for each in modal.boxes.values() if each.runs} == before


async def test_the_image_has_layers_of_libraries_packages_and_files(modal: FakeModal) -> None:
    """As Modal's builder makes them: pip checks the hashes there, and only what has changed is made again."""
    modal.layers.clear()
    async with started(packages=["six==1.16.0"]):
        pass
    installed = [line for layer in modal.layers for line in layer.commands if "--target" in line]
    assert len(installed) == 2 and "--require-hashes" in installed[0] and "six==1.16.0" in installed[1]
    (files,) = [layer.files for layer in modal.layers if "COPY . /" in layer.commands]
    assert {"/opt/rlm/bin/agent", "/opt/rlm/agent/rlm_agent/container.py"} <= set(files)


WRITABLE = """
import os, stat
for top, folders, files in os.walk("/opt"):
    for path in (os.path.join(top, each) for each in (*folders, *files)):
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode) and mode & 0o022: print(path, oct(mode))
"""


WRITABLE_FOLDERS = """
import os
own = os.getcwd()
found = []
for top, folders, files in os.walk("/"):
    skip = top in ("/proc", "/sys", "/dev") or top == own
    if skip or os.lstat(top).st_dev != os.lstat("/").st_dev: folders[:] = []
    elif os.access(top, os.W_OK): found.append(top)
sorted(found)
"""


async def test_whatever_the_hosts_umask_cells_can_change_nothing_of_the_agent(modal: FakeModal) -> None:
    before = os.umask(0)
    try:
        async with started() as sandbox, Session(sandbox, sandbox._spec, echo) as session:
            assert (await session.execute(WRITABLE)).stdout == ""
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "path", ["/", "/opt", "/opt/rlm", "/usr/local/lib", "/mnt/../usr", "data", "/tmp", "//opt/rlm"]
)
async def test_a_volume_is_not_mounted_over_what_root_runs(path: str) -> None:
    with pytest.raises(ConfigError, match="mount below /mnt or /data"):
        await environment(volumes={path: "known"}).start()


async def test_cells_can_write_to_no_folder_but_their_own_and_tmp(modal: FakeModal) -> None:
    async with started() as sandbox, Session(sandbox, sandbox._spec, echo) as session:
        assert (await session.execute(WRITABLE_FOLDERS)).stdout == "['/tmp']\n"
        assert (
            await session.execute("import ctypes; ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)")
        ).stdout == "1\n"


def test_the_log_of_a_build_is_named_once() -> None:
    ids = "im-1"
    known = f"Image build for {ids} failed.\nView the build logs:\n  modal image logs {ids}"
    for text in (known, "Image build for im-1 failed with the exception:\nno such package"):
        error = modal_sdk.ImageBuildError(text, ids)
        assert modal_environment._explain(error).count(f"modal image logs {ids}") == 1


async def test_what_a_snapshot_has_of_a_shared_folder_stays(modal: FakeModal) -> None:
    """Packages of one namespace are in one folder, which pip would replace."""
    async with started(packages=["jaraco.context"]) as sandbox:
        image = await sandbox.snapshot()
    async with (
        started(image=image, packages=["jaraco.functools"]) as sandbox,
        Session(sandbox, sandbox._spec, echo) as session,
    ):
        result = await session.execute("import jaraco.context, jaraco.functools; print('both')")
        assert result.stdout == "both\n", result.stderr


async def test_a_package_that_is_not_there_is_named(modal: FakeModal) -> None:
    with pytest.raises(EngineError, match="no-such-package-of-anybody"):
        await environment(packages=["no-such-package-of-anybody"]).start()


async def test_ending_what_has_gone_meanwhile_is_quiet(
    modal: FakeModal, caplog: pytest.LogCaptureFixture
) -> None:
    async with started() as sandbox:
        box = modal.boxes.pop(box_of(modal, sandbox).id)
        await environment().remove(sandbox.id)
    assert not caplog.messages
    modal.boxes[box.id] = box
    await asyncio.to_thread(modal.terminate, box.id)


@pytest.mark.needs("runsc")
def test_on_gvisor_a_cell_that_takes_too_much_memory_is_held_back_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As at Modal, whose sandboxes are gVisor's; in a process of its own, for a service of its own."""
    with FakeModal(Containers("modal", "runsc")) as service:
        lead_to_modal(service, monkeypatch)
        rlm = str(Path(sys.executable).parent / "rlm")
        command = [rlm, "conformance", "modal", "transaction", "state", "policy.memory", "--json"]
        done = subprocess.run(
            [*command, "-o", "transport=stdio", "-o", "memory=1GiB", "-o", "lease=10"],
            capture_output=True,
            text=True,
            timeout=110,
        )
    found = {line["check"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert {each["status"] for each in found.values()} == {"passed"}, found
    assert "transaction.memory" in found and done.returncode == 0


async def test_a_host_that_exits_without_stopping_leaves_nothing(modal: FakeModal) -> None:
    before = {each.id for each in modal.boxes.values() if each.runs}
    program = "import asyncio\nfrom rlm_core.environment import make_environment\nasyncio.run(make_environment('modal', {'memory': '1GiB'}).start())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert {each.id for each in modal.boxes.values() if each.runs} == before
    assert "SandboxTerminateV2" in modal.requests


FETCH = """
import ssl, urllib.request
def fetch(url):
    try:
        return urllib.request.urlopen(url, context=ssl._create_unverified_context(), timeout=10).read()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
"""


@WAYS
async def test_hosts_of_the_list_are_reached_through_the_agent(transport: str) -> None:
    authority = trustme.CA()
    async with https_server(authority, "127.0.0.1") as port, https_server(authority, "127.0.0.1") as other:
        async with started(transport=transport, network=[f"127.0.0.1:{port}"]) as sandbox:
            async with Session(sandbox, sandbox._spec, echo) as session:
                code = f"{FETCH}\nfor p in ({port}, {other}): print(fetch(f'https://127.0.0.1:{{p}}'))"
                first, second = (await session.execute(code)).stdout.splitlines()
    assert first == "b'hello'" and f"127.0.0.1:{other} is not in the allowlist" in second


def test_the_doctor_starts_nothing_that_costs_money(modal: FakeModal) -> None:
    before = len(modal.boxes)
    what_the_doctor_says_of("modal")
    assert len(modal.boxes) == before


def test_the_snippet_of_the_docs_runs(modal: FakeModal, tmp_path: Path) -> None:
    run_the_snippet_of("Modal", tmp_path)
    assert any(box.tags.get("team") == "my-project" for box in modal.boxes.values())


@pytest.mark.parametrize(
    "stage",
    ["AppGetOrCreate", "ImageGetOrCreate", "SandboxCreateV2", "TaskExecStart", "SandboxWaitUntilReady"],
)
async def test_ctrl_c_at_any_moment_of_a_start_leaves_nothing(
    modal: FakeModal, stage: str, tmp_path: Path
) -> None:
    before = {each.id for each in modal.boxes.values() if each.runs}
    await ends_at_ctrl_c("modal", modal.requests, stage, tmp_path)
    assert {each.id for each in modal.boxes.values() if each.runs} == before


async def test_the_command_ends_what_another_process_has_started() -> None:
    async with started() as sandbox:
        await asyncio.to_thread(reaped_by_command, "modal", sandbox.id)
