"""The page as its own program in surroundings that it did not choose. Needs requirements/demo.txt, no browser."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tiny import ROOT
from tiny_runs import write_run

pytest.importorskip("gradio")
from gradio_client import Client  # noqa: E402

QUESTION = {"text": "Which pond?", "files": []}
SAMPLING = (4, True, 0.7, 0.9, "")
DEAD = "127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    write_run(folder, base, 1)
    return folder


@contextmanager
def served(run, *flags: str, **environment: str):
    """The address of a page, and its output so far."""
    command = [sys.executable, "demo.py", "--runs", str(run), "--device", "cpu", "--data_root", str(run), *flags]
    log = run.with_name("page.log")
    with open(log, "w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env={
            **os.environ, **environment}) as page:
        run.with_name("page.pid").write_text(str(page.pid))
        try:
            end = time.monotonic() + 60
            while "the page is at" not in log.read_text() or "\n" not in log.read_text():
                assert page.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            time.sleep(0.3)  # for what follows the line
            yield log.read_text().split("the page is at ")[1].split()[0], log
            if page.poll() is not None:
                assert page.returncode == 0, log.read_text()
        finally:
            page.terminate()


def answer(client: Client) -> str:
    """The sum is of a whole round: a question is asked and answered."""
    client.predict(QUESTION, "", "", api_name="/send")
    history, *_ = client.predict("first", *SAMPLING, api_name="/answer")
    return str(history[-1])


def test_the_page_answers_in_a_notebooks_environment_behind_a_dead_proxy(run):
    with served(run, MPLBACKEND="module://matplotlib_inline.backend_inline", HOME="/dev/null", PYTHONIOENCODING="ascii",
                http_proxy=f"http://{DEAD}", https_proxy=f"http://{DEAD}", all_proxy=f"socks5://{DEAD}", no_proxy="",
                GRADIO_SERVER_PORT="tcp://10.43.0.9:7860") as (address, log):  # Kubernetes', of a service of this name
        client = Client(address, verbose=False)
        assert "tokens in" in answer(client)
        assert "Traceback" not in log.read_text()


def test_ctrl_c_ends_the_page_in_a_word_though_it_is_open_and_answers(run):
    with served(run) as (address, log):
        client = Client(address, verbose=False)
        client.predict(QUESTION, "", "", api_name="/send")
        job = client.submit("first", 100, *SAMPLING[1:], api_name="/answer")
        while not job.outputs():
            time.sleep(0.01)
        pid = int(run.with_name("page.pid").read_text())
        os.kill(pid, signal.SIGINT)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert log.read_text().endswith("\nthe page is closed\n")


def test_no_message_ends_the_page(run):
    with served(run) as (address, log):
        client = Client(address, verbose=False)
        odd = [(question, "", "") for question in (
            {"text": None, "files": []}, {"text": "a\0b", "files": []}, {"text": "a" * 100_000, "files": []},
            {"text": "<script>alert(1)</script></s>", "files": []}, {"text": "\x1b[2J\u202e", "files": []},
            {"text": "x", "files": None}, {"files": []}, None, 5, [],
            {"text": "x", "files": [{"path": "/etc/passwd"}]})]
        odd += [(QUESTION, None, None), (QUESTION, "", "one"), (QUESTION, "", "a\n" * 9)]
        for message in odd:
            try:
                for choice in ("first", "none", None):
                    client.predict(*message, api_name="/send")
                    client.predict(choice, *SAMPLING, api_name="/answer")
                client.predict(*message, ["first", "none"], *SAMPLING, api_name="/compare")
                client.predict(api_name="/answer_several")
                client.predict("first", *SAMPLING[:-1], "no number", api_name="/answer")
            except Exception as error:  # the page's refusal
                assert "Connect" not in type(error).__name__
        assert "tokens in" in answer(client)


def test_the_network_sees_a_password_prompt_and_the_user_the_tunnel(run):
    import httpx
    with served(run, "--server_name", "0.0.0.0", "--auth", "me:secret", SLURM_SUBMIT_HOST="login3") as (address, log):
        address = address.replace("0.0.0.0", "127.0.0.1")
        port = address.rsplit(":")[-1].strip("/")
        assert httpx.get(f"{address}/config", trust_env=False).status_code == 401
        assert "tokens in" in answer(Client(address, auth=("me", "secret"), verbose=False))
        assert f":{port} is not encrypted" in log.read_text() and f":{port} login3" in log.read_text()
        assert "secret" not in log.read_text()
