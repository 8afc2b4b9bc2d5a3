"""A public deployment on a simulated AWS: what the internet sees of it, and what vLLM sees of its machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from deployments import ASK, on_node
from simcloud import SimCloud
from test_aws import CLOUD, outside, up

__all__ = ["CLOUD"]
SERVE_USER = "mistralctl-serve"
CURL = ["env", "-u", "CURL_CA_BUNDLE", "curl", "-sS"]  # the simulated laptop has a bundle of its own there
LET_IN = {
    "GET /health": [200, 200, 200], "GET /v1/models": [401, 401, 200], "POST /v1/completions": [401, 401, 400],
    "POST /v1/chat/completions": [401, 401, 400],
}  # fmt: skip


@pytest.fixture(scope="module")
def public(sim: SimCloud) -> dict[str, Any]:
    return up(sim, "--name", "public", "--public", "--allow", "127.0.0.0/24")


@pytest.fixture(scope="module")
def variables(sim: SimCloud, public: dict[str, Any]) -> dict[str, str]:
    """What `mistralctl env` tells a shell."""
    lines = sim.run(["mistralctl", "env", "public"]).stdout
    return dict(line.removeprefix("export ").split("=", 1) for line in lines.splitlines())


def address(sim: SimCloud) -> str:
    [instance] = sim.instances("aws")
    assert instance.address
    return instance.address


def rules(sim: SimCloud) -> list[Any]:
    """From where the firewall lets in who asks for the server's port."""
    said = sim.run(["aws", "ec2", "describe-security-groups", "--region", "us-east-1"]).stdout
    every = [rule for group in json.loads(said)["SecurityGroups"] for rule in group["IpPermissions"]]
    return [rule["IpRanges"] for rule in every if rule.get("FromPort") == 8000]


def test_clients_reach_it_with_what_env_says_and_nothing_else(
    sim: SimCloud, public: dict[str, Any], variables: dict[str, str]
) -> None:  # fmt: skip
    assert public["base_url"] == variables["OPENAI_BASE_URL"] == f"https://{address(sim)}:8000/v1"
    assert "Paris" in sim.run([sys.executable, "-c", ASK], env=variables).stdout
    assert "Paris" in sim.run(["mistralctl", "chat", "public", "-m", "What is the capital of France?"]).stdout
    asked = [
        *CURL,
        "-m",
        "20",
        f"{variables['OPENAI_BASE_URL']}/models",
        "-H",
        f"Authorization: Bearer {variables['OPENAI_API_KEY']}",
    ]
    assert json.loads(sim.run(asked, env=variables).stdout)["data"]
    assert sim.run(asked, check=False).returncode == 60  # who does not trust its certificate
    assert sim.run(["mistralctl", "connect", "public"], check=False).returncode == 5
    [one] = json.loads(sim.run(["mistralctl", "status", "public", "-o", "json"]).stdout)["items"]
    assert (one["state"], one["why"]) == ("up", "")
    assert up(sim, "--name", "public", "--public", "--allow", "127.0.0.0/24")["action"] == "unchanged"


def test_every_route_is_shut_but_the_short_list(sim: SimCloud, public: dict[str, Any], variables: dict[str, str]) -> None:
    routes = on_node(sim, "public", "cat ~/.mistralctl/run/public/shared/routes.json")
    url = variables["OPENAI_BASE_URL"].removesuffix("/v1")
    found = outside(sim, "routes", url, variables["SSL_CERT_FILE"], variables["OPENAI_API_KEY"], given=routes)
    let_in = {route: codes for route, codes in found.items() if codes != [401, 401, 404]}
    assert let_in == LET_IN == public["gate"]["let_in"]
    assert len(found) > 20
    print(f"\n{(sim.home / '.mistralctl' / 'deployments' / 'public' / 'gate.txt').read_text()}{public['gate']}")


def test_only_two_ports_are_open_and_the_one_speaks_tls_alone(sim: SimCloud, public: dict[str, Any]) -> None:
    there = address(sim)
    assert outside(sim, "ports", there) == [22, 8000]
    assert sim.run(["curl", "-sS", "-m", "5", f"http://{there}:8000/health"], check=False).returncode in (1, 52, 56)
    versions = outside(sim, "tls", there, "8000")
    print(versions)
    assert {name for name, said in versions.items() if said.startswith("refused: ")} == {"TLSv1", "TLSv1_1"}
    assert "NO_PROTOCOLS_AVAILABLE" not in str(versions)  # it was the server who refused
    assert (versions["TLSv1_2"], versions["TLSv1_3"]) == ("TLSv1.2", "TLSv1.3")


def test_only_who_is_allowed_may_ask(sim: SimCloud, public: dict[str, Any], variables: dict[str, str]) -> None:
    for route in ("/health", "/v1/models"):
        asked = [*CURL, "--interface", "127.9.9.9", "-H", f"Authorization: Bearer {variables['OPENAI_API_KEY']}"]
        answer = sim.run([*asked, f"https://{address(sim)}:8000{route}"], env=variables).stdout
        assert json.loads(answer)["error"]["message"] == "127.9.9.9 is not an address that may ask"
    assert rules(sim) == [[{"CidrIp": "127.0.0.0/24"}]]


def test_vllm_is_a_user_of_its_own_who_reaches_neither_the_metadata_service_nor_others_files(
    sim: SimCloud, public: dict[str, Any]
) -> None:  # fmt: skip
    [one] = json.loads(sim.run(["mistralctl", "status", "public", "-o", "json"]).stdout)["items"]
    assert one["launcher"]["isolation"] == {"user": SERVE_USER, "why": ""}
    [pid] = on_node(sim, "public", f"pgrep -u {SERVE_USER} -f ward.py").split()
    users = on_node(sim, "public", "ps -eo user:20,args | grep '[c]li.main serve\\|[V]LLM'").splitlines()
    assert {line.split()[0] for line in users} == {SERVE_USER}
    ask = "curl -s -m 3 -o /dev/null -w '%{http_code}' -X PUT http://169.254.169.254/latest/api/token"
    assert on_node(sim, "public", ask) == "200"  # SkyPilot's autostop needs it
    as_vllm = f"sudo nsenter -t {pid} -m -r -- setpriv --reuid {SERVE_USER} --regid {SERVE_USER} --clear-groups"
    assert on_node(sim, "public", f"{as_vllm} {ask} || true") == "000"
    assert on_node(sim, "public", f"sudo setpriv --reuid {SERVE_USER} --clear-groups {ask} || true") == "000"
    seen = on_node(sim, "public", f"{as_vllm} find /home/ubuntu -maxdepth 2 -not -path '*/.local*'").split()
    assert sorted(seen) == ["/home/ubuntu", *(f"/home/ubuntu/.mistralctl{part}" for part in ("", "/envs", "/run", "/weights"))]
    assert on_node(sim, "public", f"{as_vllm} ls /home/ubuntu/.mistralctl/run/public").split() == ["keys", "shared", "site"]
    for path in ("~/.sky", "~/.ssh/authorized_keys", "~/.mistralctl/run/public/secrets.json"):
        there = path.replace("~", "/home/ubuntu")
        assert on_node(sim, "public", f"ls -d {there}").strip() == there
        assert on_node(sim, "public", f"{as_vllm} cat {there} 2>&1 || true").strip().endswith("No such file or directory")
    touch = f"{as_vllm} touch /home/ubuntu/.mistralctl/run/public/site/x 2>&1 || true"
    assert "Read-only file system" in on_node(sim, "public", touch)
    assert "NoNewPrivs:\t1" in on_node(sim, "public", f"cat /proc/{pid}/status")
    tls_key = "/home/ubuntu/.mistralctl/run/public/shared/tls.key"
    assert on_node(sim, "public", f"sudo stat -c '%U %a' {tls_key}").split() == [SERVE_USER, "600"]


def test_down_takes_its_firewall_rule_away_too(sim: SimCloud, public: dict[str, Any]) -> None:
    assert sim.run(["mistralctl", "down", "public"]).stdout == "public is down\n"
    assert sim.instances("aws") == []
    assert rules(sim) == []
