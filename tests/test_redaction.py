"""Passwords and tokens never get into a file, a log, a parameter or a message."""

import subprocess
import sys
from pathlib import Path

import pytest

from caco import errors
from caco.config import composition, validation
from caco.errors import UserError
from caco.redaction import completed, holds_secret, redacted, shortened
from caco.runs.directory import command, record_failure
from caco.tracking.ledger import LedgerTracker
from caco.tracking.store import first_line, own_uri, resolve_uri

WITH = [
    ("postgresql://me:Gehe1m@host:5432/db", "postgresql://me:***@host:5432/db"),
    ("postgresql://me:p@ss:w0rd@host/db", "postgresql://me:***@host/db"),
    ("mysql+pymysql://me:Gehe1m@host/db?charset=utf8", "mysql+pymysql://me:***@host/db?charset=utf8"),
    ("postgresql://host/db?user=me&password=Gehe1m&x=1", "postgresql://host/db?user=me&password=***&x=1"),
    ("postgresql://me:pa/ss@host/db", "postgresql://me:***@host/db"),
    ("'postgresql://me:pa ss@host/db'", "'postgresql://me:***@host/db'"),
    ("postgresql://me:pa'ss@host/db", "postgresql://me:***@host/db"),
    ("runs/http:/me:Gehe1m@host", "runs/http:/me:***@host"),
    ("export MLFLOW_TRACKING_TOKEN=Gehe1m", "export MLFLOW_TRACKING_TOKEN=***"),
    ('{"api_key": "Gehe1m"}', '{"api_key": "***"}'),
    ("PGPASSWORD=Gehe1m psql", "PGPASSWORD=*** psql"),
    ("{'Authorization': 'Bearer Gehe1m'}", "{'Authorization': 'Bearer ***'}"),
    ("AccountName=me;AccountKey=Gehe1m==;x=1", "AccountName=me;AccountKey=***;x=1"),
]
WITHOUT = [
    "http://host:5000", "http://host:5000/x, says me@host", "{'uri': 'http://host:x', 'mail': 'me@host'}",
    "sqlite:///a:b@c/x", "https://host: no answer from me@host",
    "sqlite:///a:b@c/mlflow.db", "https://me@host/x", "backbone.register_tokens=4", "http://me:***@host", "key=value",
]  # fmt: skip


@pytest.mark.parametrize("text, shown", WITH)
def test_secrets_in_addresses_and_assignments_are_found(text, shown):
    assert redacted(text) == shown == redacted(shown) and holds_secret(text) and not holds_secret(shown)


@pytest.mark.parametrize("text", WITHOUT)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text and not holds_secret(text)


def test_what_is_cut_for_a_message_is_hidden_first():
    assert "Gehe" not in shortened({"uri": f"http://me:{'Gehe1m' * 30}@host"}, 40)


def test_folders_and_files_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", "/some/where")
    (tmp_path / "key.json").write_text("")
    monkeypatch.setenv("CLOUD_CREDENTIALS", str(tmp_path / "key.json"))
    assert redacted(f"/some/where {tmp_path}/key.json") == f"/some/where {tmp_path}/key.json"


def test_what_the_environment_keeps_secret_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "Gehe1m-77")
    monkeypatch.setenv("PGPASSWORD", "libpqs-0wn")
    assert redacted("no entry for libpqs-0wn") == "no entry for ***"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:an%20other1@host:5000")
    assert redacted("401 for Gehe1m-77 and an other1 (an%20other1)") == "401 for *** and *** (***)"


@pytest.mark.parametrize(
    "setting",
    ["tracking.uri='http://me:Gehe1m@host:5000'", "+tracking.password=Gehe1m", "tracking.uri='${oc.env:STORE}'"],
)
def test_a_setting_that_holds_one_is_refused_without_showing_it(setting, monkeypatch):
    monkeypatch.setenv("STORE", "postgresql://me:Gehe1m@host/db")
    cfg = composition.compose(["data=digits", "tracking=mlflow", setting])
    with pytest.raises(UserError, match="holds a password or a token, and settings are written into files") as refused:
        validation.check(composition.job_config(cfg))
    assert "Gehe1m" not in str(refused.value)


def test_lines_of_a_job_that_hold_one_are_refused():
    cfg = composition.compose(
        ["data=digits", "tracking=ledger", "launcher=local", "launcher.setup=['export MY_TOKEN=Gehe1m']"]
    )
    with pytest.raises(UserError, match="launcher.setup.0: holds a password"):
        validation.check(composition.job_config(cfg))


def test_messages_failures_commands_and_parameters_have_none(tmp_path, monkeypatch, capsys):
    address = "postgresql://me:Gehe1m@host/db"
    errors.show(UserError(f"no answer from {address}"))
    record_failure(tmp_path, f"ConnectionError: {address}")
    monkeypatch.setattr(sys, "argv", ["caco-train", f"tracking.uri={address}"])
    tracker = LedgerTracker(system_seconds=0)
    tracker.start(tmp_path, params={"tracking.uri": address}, tags={"why": address}, run_name="n", state=None)
    tracker.finish("FINISHED", {})
    said = capsys.readouterr().err + command() + first_line(OSError(address))
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Gehe1m" not in said + written and "me:***@host" in said and "me:***@host" in written
    with pytest.raises(UserError) as refused:
        resolve_uri("ftp://me:Gehe1m@host")
    assert "Gehe1m" not in str(refused.value)


def test_the_traceback_of_a_bug_has_none(tmp_path):
    code = (
        "from caco.errors import shown\nwith shown():\n    1 / 0 if False else"
        " [].index('postgresql://me:Gehe1m@host/db')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "Gehe1m" not in done.stderr


def test_a_store_is_written_down_without_its_password_and_found_again_with_it(tmp_path, monkeypatch):
    (tmp_path / "mlflow.json").write_text('{"uri": "postgresql://me:***@host/db"}')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        UserError, match=r"store is postgresql://me:\*\*\*@host/db, whose password is not recorded anywhere"
    ):
        own_uri(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:Gehe1m@host/db")
    assert own_uri(tmp_path) == "postgresql://me:Gehe1m@host/db"
    assert completed("http://me:***@host", "http://me:Gehe1m@elsewhere") is None
