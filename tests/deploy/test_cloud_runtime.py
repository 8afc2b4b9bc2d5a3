"""What goes to SkyPilot, to ssh and to AWS, without a machine; tests/e2e has the machines."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from mistralctl import owners, state, sweep
from mistralctl.clouds import NotUsed, Part, identity, listing, names
from mistralctl.clouds.aws import api as aws
from mistralctl.commands import reap
from mistralctl.errors import UserError
from mistralctl.phases import Progress
from mistralctl.runtime import ssh
from mistralctl.runtime.sky import _sdk, configuration, own_identity
from mistralctl.runtime.ssh import Address


@pytest.mark.parametrize("clouds", [{}, {"aws": {"remote_identity": "LOCAL_CREDENTIALS"}}])
def test_no_key_of_a_cloud_goes_to_a_node(clouds: dict[str, Any]) -> None:
    made = configuration({}, clouds)
    assert {cloud: made[cloud]["remote_identity"] for cloud in names()} == dict.fromkeys(names(), "NO_UPLOAD")


def test_secrets_are_out_of_the_environment_while_any_thread_wants_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")

    def inherited() -> bool:
        return (
            subprocess.run([sys.executable, "-c", "import os, sys; sys.exit('HF_TOKEN' in os.environ)"], check=False).returncode
            == 1
        )

    assert inherited()
    with state.secrets_hidden():
        with ThreadPoolExecutor(1) as pool, state.secrets_hidden():
            assert not pool.submit(inherited).result()
        assert not inherited()  # the inner one has ended, the outer one has not
    assert inherited()


def test_the_users_own_identity_and_network_are_kept() -> None:
    made = configuration({"gcp": {"vpc_name": "mine"}}, {"aws": {"remote_identity": "my-role"}, "gcp": None})
    assert made["gcp"] == {"vpc_name": "mine", "remote_identity": "NO_UPLOAD"}
    assert "remote_identity" not in made["aws"]  # what the user's file says holds


def test_what_an_identity_of_the_users_own_may_do_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYPILOT_GLOBAL_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("SKYPILOT_PROJECT_CONFIG", str(tmp_path / "none"))
    assert not own_identity("azure")
    (tmp_path / "config.yaml").write_text("azure: {remote_identity: mine}\naws: {remote_identity: NO_UPLOAD}\ngcp:\n")
    assert [own_identity(cloud) for cloud in names()] == [False, False, True]
    monkeypatch.setenv("SKYPILOT_PROJECT_CONFIG", str(tmp_path / "project.yaml"))
    (tmp_path / "project.yaml").write_text("azure: {remote_identity: NO_UPLOAD}\ngcp: {remote_identity: mine@project}\n")
    assert [own_identity(cloud) for cloud in names()] == [False, True, False]


def test_a_folders_own_configuration_holds_for_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SKYPILOT_PROJECT_CONFIG", "")
    monkeypatch.setenv("SKYPILOT_GLOBAL_CONFIG", str(tmp_path / "none"))
    (tmp_path / "none").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".sky.yaml").write_text("gcp: {vpc_name: mine}\n")
    for _ in range(2):
        with _sdk():
            made = yaml.safe_load((tmp_path / "home" / "skypilot.yaml").read_text())
            assert made["gcp"] == {"vpc_name": "mine", "remote_identity": "NO_UPLOAD"}


def test_skypilot_accepts_the_configuration() -> None:
    import sky.utils.common_utils
    import sky.utils.schemas

    common_utils: Any = sky.utils.common_utils
    schemas: Any = sky.utils.schemas
    common_utils.validate_schema(configuration({}, {}), schemas.get_config_schema(), "refused: ", skip_none=False)


def test_ssh_reads_what_was_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    ssh.remember("mine", Address("192.0.2.7", 2222, "ubuntu", "/a key/with space", "nc jump %p"))
    file = ssh.config_file("mine")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    read = subprocess.run([*ssh.command("mine", "-G"), ssh.HOST], capture_output=True, text=True, check=True).stdout.splitlines()
    for line in ("hostname 192.0.2.7", "port 2222", "user ubuntu", "identityfile /a key/with space", "proxycommand nc jump %p",
                 "batchmode yes", "identitiesonly yes"):  # fmt: skip
        assert line in read
    tunnel = ssh.tunnel_command("mine", 8001, 8000)
    assert tunnel[-3:] == ["-L", "127.0.0.1:8001:127.0.0.1:8000", "node"]
    assert "ControlPath=ssh.sock" in tunnel
    assert "ControlPath=ssh.sock" not in ssh.tunnel_command("mine", 8001, 8000, share=False)


def test_a_file_system_without_sockets_is_noticed(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["as deep as a home may be"] * 8)
    deep.mkdir(parents=True)
    ask = "import sys; from pathlib import Path; from mistralctl.runtime import ssh; print(ssh.can_share(Path(sys.argv[1])))"
    for folder, answer in ((deep, "True"), (Path("/proc"), "False"), (tmp_path / "nowhere", "False")):
        done = subprocess.run([sys.executable, "-c", ask, folder], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == answer, (folder, done.stderr)
    assert list(deep.iterdir()) == []


def test_where_the_tunnel_is_gone_ssh_does_not_dial_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as machine:
        ssh.remember("mine", Address("127.0.0.1", machine.getsockname()[1], "ubuntu", "/nowhere"))
        with socket.socket(socket.AF_UNIX) as left:  # by a tunnel that was killed
            monkeypatch.chdir(state.folder("mine"))
            left.bind(ssh.SHARED)
        with pytest.raises(UserError, match="cannot be reached over SSH"):
            ssh.read_status("mine", shared=True)
        machine.settimeout(0.1)
        with pytest.raises(TimeoutError):
            machine.accept()


def test_a_machine_that_is_not_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no machine is known"):
        ssh.command("mine")


def test_aws_lists_what_bears_our_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        made = []
        for owner, name in (("a1", "one"), ("a1", "two"), ("b2", "one"), ("", "")):
            tags = [{"Key": f"mistralctl-{k}", "Value": v} for k, v in (("owner", owner), ("name", name)) if v]
            given: dict[str, Any] = {"TagSpecifications": [{"ResourceType": "instance", "Tags": tags}]} if tags else {}
            [one] = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="m6i.large", **given)["Instances"]
            made.append(one["InstanceId"])
        volume = ec2.create_volume(
            AvailabilityZone="us-west-2a", Size=8,
            TagSpecifications=[{"ResourceType": "volume", "Tags": [{"Key": "mistralctl-owner", "Value": "a1"}]}],
        )["VolumeId"]  # fmt: skip
        within = ["us-west-2", "us-east-1"]
        assert [part.id for part in aws.ours("a1", "one", within)] == made[:1]
        assert [(part.id, part.kind) for part in aws.ours("a1", None, within)] == [
            (made[0], "machine"), (made[1], "machine"), (volume, "disk"),
        ]  # fmt: skip
        assert [part.id for part in aws.ours(None, None, within)] == made[:3]
        assert [part.id for part in aws.machines("a1", within)] == made[:2]
        assert [part.id for part in aws.machines(None, within)] == made[:3]
        assert aws.machines("a1", ["us-east-1"]) == []
        [part] = aws.ours("a1", "one", within)
        assert part.created is not None
        aws.relabel(part, {"mistralctl-ttl": sweep.lifetime_label(part, part.created + 90)})
        [part] = aws.ours("a1", "one", within)
        assert part.labels == {"mistralctl-owner": "a1", "mistralctl-name": "one", "mistralctl-ttl": "2"}
        assert sweep.lifetime_label(part, None) == "never"
        ec2.terminate_instances(InstanceIds=[made[0]])
        assert aws.ours("a1", "one", within) == []
        assert "us-west-2" in aws.regions()


def test_doctor_asks_the_clouds_that_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mistralctl.commands import doctor
    from mistralctl.runtime import sky
    from moto import mock_aws

    monkeypatch.setattr(sky, "refusal_of", lambda cloud, log: "no rights on EC2")  # its real one runs in tests/e2e
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def asked() -> list[tuple[str, bool, str, str]]:
        found = [check for check in doctor.run(["aws"]).checks if check.name.endswith(" on aws")]
        return [(check.name, check.ok, check.found, check.mend) for check in found]

    machines = ("machines on aws", False, "no rights on EC2", "aws configure")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert asked() == [
        ("identity on aws", False, "there are no credentials for AWS here; run aws configure", "aws configure"), machines,
    ]  # fmt: skip
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        assert asked() == [("identity on aws", True, "arn:aws:sts::123456789012:user/moto", "aws configure"), machines]
    assert not [check for check in doctor.run().checks if " on " in check.name]
    with pytest.raises(UserError, match="--cloud: 'nowhere' is not one of aws, gcp, azure"):
        doctor.run(["nowhere"])


def test_aws_narrows_the_rule_of_one_port_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        group, other = (ec2.create_security_group(GroupName=name, Description=name)["GroupId"] for name in ("one", "other"))
        world = [{"CidrIp": "0.0.0.0/0"}]
        for one in (group, other):
            every = [{"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": world} for port in (22, 8000)]
            ec2.authorize_security_group_ingress(GroupId=one, IpPermissions=every)
        tags = [{"Key": "mistralctl-owner", "Value": "a1"}, {"Key": "mistralctl-name", "Value": "one"}]
        ec2.run_instances(
            ImageId=image, MinCount=1, MaxCount=1, InstanceType="m6i.large", SecurityGroupIds=[group],
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )  # fmt: skip

        def rules(group: str) -> dict[int, list[str]]:
            [found] = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
            return {
                rule["FromPort"]: sorted(
                    [one["CidrIp"] for one in rule["IpRanges"]] + [one["CidrIpv6"] for one in rule["Ipv6Ranges"]]
                )
                for rule in found["IpPermissions"]
            }

        asked = ["2001:db8::/32", "203.0.113.0/24"]
        for _ in range(2):  # the second time there is nothing to do
            aws.narrow("a1", "one", "us-west-2", 8000, asked)
            assert rules(group) == {22: ["0.0.0.0/0"], 8000: asked}
        aws.narrow("a1", "one", "us-west-2", 8000, ["198.51.100.7/32"])
        assert rules(group)[8000] == ["198.51.100.7/32"]
        aws.narrow("a1", "one", "us-west-2", 8000, ["0.0.0.0/0"])
        assert rules(group) == rules(other) == {22: ["0.0.0.0/0"], 8000: ["0.0.0.0/0"]}
        aws.narrow("b2", "one", "us-west-2", 8000, asked)
        assert rules(group)[8000] == ["0.0.0.0/0"]  # not that owner's


@pytest.mark.parametrize(
    ("cloud", "module", "named"),
    [("aws", "botocore.exceptions", "AWS"), ("gcp", "google.auth", "Google"), ("azure", "azure.core.exceptions", "Azure")],
)
def test_a_cloud_whose_sdk_is_not_installed_is_not_used_here(
    monkeypatch: pytest.MonkeyPatch, cloud: str, module: str, named: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # its import fails as that of a package that is not there
    for ask in (lambda: listing(cloud).ours(None), lambda: identity(cloud)):
        with pytest.raises(NotUsed, match=rf"^{named}'s SDK is not installed; pip install 'mistralctl\[{cloud}\]'$"):
            ask()


@pytest.mark.parametrize(
    ("kind", "labels", "age", "due"),
    [
        ("machine", {"mistralctl-ttl": "60"}, 100, ""),
        ("machine", {"mistralctl-ttl": "60"}, 106, "its lifetime of 60 minutes is over"),
        ("machine", {"mistralctl-ttl": "never"}, 10**6, ""),
        ("machine", {}, 10**6, ""),
        ("disk", {"mistralctl-ttl": "60"}, 20, ""),
        ("disk", {}, 40, "its machine is gone"),
        ("address", {"mistralctl-name": "one"}, None, ""),
        ("address", {"mistralctl-name": "two"}, None, "its machine is gone"),
        ("interface", {}, None, "its machine is gone"),
    ],
)
def test_what_is_due(kind: str, labels: dict[str, str], age: float | None, due: str) -> None:
    created = None if age is None else 1e9 - age * 60
    part = Part("aws", kind, "i-1", "us-east-1a", "running", "m6i.large", created, labels)
    assert reap.judge(part, 1e9, {"one"}) == due


def test_reap_deletes_what_is_due_after_a_yes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("MISTRALCTL_OWNER", "someone")
    monkeypatch.setattr(reap, "GRACE_MINUTES", -61.0)  # a machine of one hour's lifetime is due at once
    monkeypatch.setattr(reap, "ORPHAN_MINUTES", -1.0)
    monkeypatch.setattr(aws, "regions", lambda: ["us-west-2", "us-east-1"])
    mine = owners.current({"MISTRALCTL_OWNER": "someone"})
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]

        def labelled(kind: str, owner: str, name: str, ttl: str = "60") -> dict[str, Any]:
            labels = {"owner": owner, "name": name, "ttl": ttl}
            tags = [{"Key": f"mistralctl-{key}", "Value": value} for key, value in labels.items()]
            return {"TagSpecifications": [{"ResourceType": kind, "Tags": tags}]}

        def machine(*labels: str) -> str:
            asked = {"ImageId": image, "MinCount": 1, "MaxCount": 1, "InstanceType": "g6.xlarge"} | labelled("instance", *labels)
            return str(ec2.run_instances(**asked)["Instances"][0]["InstanceId"])

        def address(**labels: Any) -> str:
            return str(ec2.allocate_address(Domain="vpc", **labels)["AllocationId"])

        def interface(**labels: Any) -> str:
            return str(ec2.create_network_interface(SubnetId=subnet, **labels)["NetworkInterface"]["NetworkInterfaceId"])

        def disk(**labels: Any) -> str:
            return str(ec2.create_volume(AvailabilityZone="us-west-2a", Size=100, **labels)["VolumeId"])

        due, kept, theirs = machine(mine, "due"), machine(mine, "kept", "never"), machine("other", "due")
        left = [
            address(**labelled("elastic-ip", mine, "due")), interface(**labelled("network-interface", mine, "due")),
            disk(**labelled("volume", mine, "kept")),
        ]  # fmt: skip
        used = address(**labelled("elastic-ip", mine, "kept"))
        ec2.associate_address(AllocationId=used, InstanceId=kept)
        nobodys = [address(), interface(), disk()]

        def ask(**options: Any) -> dict[str, tuple[str, bool]]:
            given: dict[str, Any] = {"all_owners": False, "dry_run": False, "confirm": lambda found: True} | options
            return {found.id: (found.due, found.deleted) for found in reap.run(["aws"], **given).parts}

        over, gone = "its lifetime of 60 minutes is over", "its machine is gone"
        machines = {due: (over, False), kept: ("", False)}
        loose = {left[0]: ("", False), left[1]: ("", False), left[2]: (gone, False)}
        assert ask(dry_run=True) == ask(confirm=lambda found: False) == machines | loose
        prices = {found.id: found.per_day for found in reap.run(["aws"], all_owners=False, dry_run=True, confirm=bool).parts}
        assert prices == {due: prices[kept], kept: prices[due], left[0]: 0.12, left[1]: 0.0, left[2]: 0.26}
        assert (prices[due] or 0) > 10
        assert ask() == machines | loose | {due: (over, True), left[2]: (gone, True)}
        assert ask() == {kept: ("", False), left[0]: (gone, True), left[1]: (gone, True)}
        assert ask() == {kept: ("", False)}
        assert ask(all_owners=True) == {kept: ("", False), theirs: (over, True)}
        aws.delete([Part("aws", "disk", left[2], "us-west-2a", "", "", None, {})])  # another one was faster
        assert {one["AllocationId"] for one in ec2.describe_addresses()["Addresses"]} == {used, nobodys[0]}
        assert nobodys[1] in [one["NetworkInterfaceId"] for one in ec2.describe_network_interfaces()["NetworkInterfaces"]]
        assert nobodys[2] in [one["VolumeId"] for one in ec2.describe_volumes()["Volumes"]]


def test_a_cloud_that_cannot_be_asked_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))

    def ask(*clouds: str) -> reap.Reaped:
        return reap.run(clouds, all_owners=False, dry_run=True, confirm=bool)

    why = "there are no credentials for AWS here; run aws configure"
    assert ask().clouds[0] == reap.Asked("aws", "not used", why)
    assert ask("aws") == reap.Reaped((reap.Asked("aws", "unknown", why),), ())
    with pytest.raises(UserError, match=f"aws: {why}"):
        reap.check(ask("aws"))
    not_used = reap.Asked("gcp", "not used", "no credentials")
    reap.check(reap.Reaped((reap.Asked("aws", "asked"), not_used), ()))
    with pytest.raises(UserError, match="no cloud could be asked: gcp: no credentials"):
        reap.check(reap.Reaped((not_used,), ()))
    with pytest.raises(UserError, match="--cloud: gpc is not one of aws, gcp, azure"):
        ask("gpc")


def test_a_job_that_ray_ended_for_want_of_memory_is_called_that() -> None:
    progress = Progress(lambda event: None)
    progress.line("starting the server\n")
    assert progress.failure == ""
    progress.line(
        "Memory on the node (IP: 10.0.0.4, ID: fbe2) where the task (task ID: f256, name=m, pid=549, memory used=0.14GB) was running was "
        "22.40GB / 23.54GB (0.951362), which exceeds the memory usage threshold of 0.95. Ray killed this worker (ID: ab2f)\n"
    )
    progress.line("Refer to the documentation on how to address the out of memory issue\n")
    assert progress.failure.startswith("the machine's memory was full (22.40GB of 23.54GB), ")
