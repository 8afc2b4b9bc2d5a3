"""Amazon: moto answers the API; launching an instance boots a node, stopping or terminating it cuts its power.

What moto lacks is added here: addresses on loopback, refusals with Amazon's codes, the default that a root volume goes with
its instance, instance metadata with the role's credentials, and a journal.
"""

from __future__ import annotations

import csv
import json
import os
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from simcloud import catalog, gpus, s3
from simcloud.cloud import Cloud
from simcloud.node_init import METADATA_ADDRESS, Machine
from simcloud.nodes import Service

ADDRESS = "127.0.0.1"
API_PORT, METADATA_PORT = 5000, 5001
PORTS: tuple[int, ...] = (API_PORT, METADATA_PORT)
NAMES: tuple[str, ...] = ()
STORE = s3
ENDPOINT = f"http://{ADDRESS}:{API_PORT}"
CREDENTIALS = {"aws_access_key_id": s3.LAPTOP["accessKey"], "aws_secret_access_key": s3.LAPTOP["secretKey"]}

ACCOUNT, PARTITION = "123456789012", "aws"  # moto's
ROLE = "skypilot-v1"  # the one that SkyPilot makes: made beforehand, or each SimCloud waits 30 s for it to spread
HOME_REGION = "us-east-1"
ROOT_DEVICE = "/dev/sda1"
ON_DEMAND_QUOTA, SPOT_QUOTA = "L-1216C47A", "L-34B43A08"
QUOTA_LIMIT = 256.0  # vCPUs, of every quota until a test says otherwise


@dataclass(frozen=True)
class Refusal:
    """How Amazon words it; `status` is HTTP's. 5xx makes its SDK try again, as it does with the real one."""

    code: str
    status: int
    message: str


CAPACITY = Refusal("InsufficientInstanceCapacity", 500, (
    "We currently do not have sufficient {instance_type} capacity in the Availability Zone you requested ({zone}). Our system "
    "will be working on provisioning additional capacity."
))  # fmt: skip
SPOT_CAPACITY = Refusal("InsufficientInstanceCapacity", 500, "There is no Spot capacity available that matches your request.")
QUOTA = Refusal("VcpuLimitExceeded", 400, (
    "You have requested more vCPU capacity than your current vCPU limit of 0 allows for the instance bucket that the specified "
    "instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to request an adjustment to this limit."
))  # fmt: skip
SPOT_QUOTA_REFUSAL = Refusal("MaxSpotInstanceCountExceeded", 400, "Max spot instance count exceeded")
PRICE = Refusal(
    "SpotMaxPriceTooLow", 400, "Your Spot request price is lower than the minimum required Spot request fulfillment price."
)
PERMISSION = Refusal("UnauthorizedOperation", 403, (
    "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/laptop is not authorized to perform: "
    "{service}:{action} on resource: arn:aws:{service}:{region}:123456789012:*/* because no identity-based policy allows the "
    "{service}:{action} action."
))  # fmt: skip
THROTTLE = Refusal("RequestLimitExceeded", 503, "Request limit exceeded.")
CREDENTIALS_REFUSED = Refusal("AuthFailure", 401, "AWS was not able to validate the provided access credentials")
TOKEN_REFUSED = Refusal("InvalidClientTokenId", 403, "The security token included in the request is invalid.")


def refusal(kind: str, service: str, spot: bool) -> Refusal:
    if kind == "credentials":
        return CREDENTIALS_REFUSED if service == "ec2" else TOKEN_REFUSED
    table = {
        "capacity": (CAPACITY, SPOT_CAPACITY), "quota": (QUOTA, SPOT_QUOTA_REFUSAL), "permission": (PERMISSION, PERMISSION),
        "throttle": (THROTTLE, THROTTLE), "price": (PRICE, PRICE),
    }  # fmt: skip
    return table[kind][spot]


# ---- the laptop


def prepare(folder: Path, home: Path) -> dict[str, str]:
    """Settings and credentials as `aws configure` leaves them, with the endpoints; SkyPilot's catalog: the project's own."""
    settings = home / ".aws"
    settings.mkdir(parents=True)
    (settings / "credentials").write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in CREDENTIALS.items()))
    (settings / "config").write_text(
        f"[default]\nregion = {HOME_REGION}\nendpoint_url = {ENDPOINT}\nservices = simulated\n"
        f"[services simulated]\ns3 =\n  endpoint_url = {s3.ENDPOINT}\n"
    )
    tables = catalog.lay_out(home, "aws")
    with (tables / "vms.csv").open() as file:
        types = sorted({row["InstanceType"] for row in csv.DictReader(file)})
    with (tables / "instance_quota_mapping.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["InstanceType", "OnDemandInstanceCode", "SpotInstanceCode"])
        rows.writerows([name, ON_DEMAND_QUOTA, SPOT_QUOTA] for name in types)
    images = sorted({row["ImageId"] for row in catalog.images("aws") if row["ImageId"]})
    fixed = {
        "owner_id": "137112412989", "public": True, "virtualization_type": "hvm", "architecture": "x86_64", "state": "available",
        "platform": None, "image_type": "machine", "image_location": "amazon/simulated", "hypervisor": "xen",
        "root_device_name": ROOT_DEVICE, "root_device_type": "ebs", "sriov": "simple", "creation_date": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    amis = [{"ami_id": image, "name": f"simulated {image}", "description": "simulated"} | fixed for image in images]
    (folder / "amis.json").write_text(json.dumps(amis))
    return {"AWS_EC2_METADATA_DISABLED": "true"}


# ---- the cloud

SERVICES: list[Service] = [
    (ADDRESS, API_PORT, ADDRESS, API_PORT),
    (ADDRESS, s3.PORT, ADDRESS, s3.PORT),
    (METADATA_ADDRESS, 80, ADDRESS, METADATA_PORT),
]
NODE_VARIABLES = {"AWS_ENDPOINT_URL": ENDPOINT}  # that of S3 is for mistralctl to bring


class Amazon(Cloud):
    """The instances that moto knows, and the nodes that they are."""

    LAUNCH = "RunInstances"

    # what moto knows

    @staticmethod
    def regions() -> list[Any]:
        from moto.ec2.models import ec2_backends

        return list(ec2_backends[ACCOUNT].values())

    def all(self) -> list[Any]:
        found = [
            instance for region in self.regions() for held in list(region.reservations.values()) for instance in held.instances
        ]
        return sorted(found, key=lambda instance: str(instance.launch_time))

    def find(self, name: str) -> Any:
        return next(instance for instance in self.all() if instance.id == name)

    def at(self, address: str) -> Any:
        return next((one for one in self.all() if one.state_code == 16 and one.private_ip == address), None)

    def instances(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one.id, "type": one.instance_type, "region": one.region_name, "zone": one.availability_zone,
                "state": one.state, "tags": tags_of(one), "spot": one.lifecycle == "spot", "address": one.public_ip,
            }
            for one in self.all()
        ]  # fmt: skip

    def volumes(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one.id, "region": region.region_name, "zone": one.zone.name, "state": one.status, "size": one.size,
                "tags": tags_of(one), "instance": one.attachment.instance.id if one.attachment else None,
            }
            for region in self.regions() for one in list(region.volumes.values())
        ]  # fmt: skip

    def firewalls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one.id, "name": one.name, "region": region.region_name, "ports": open_ports([one]), "tags": tags_of(one),
            }
            for region in self.regions() for groups in list(region.groups.values()) for one in list(groups.values())
        ]  # fmt: skip

    # what happens to instances

    def boot(self, instance: Any) -> None:
        import yaml

        where = {
            "region": instance.region_name, "zone": instance.availability_zone, "instance_type": instance.instance_type,
            "spot": instance.lifecycle == "spot",
        }  # fmt: skip
        given: Any = instance.user_data or ""  # moto's own kind of text, or plain text
        text: str = given.decode() if hasattr(given, "as_bytes") else given
        if not text:  # not SkyPilot's: it is listed and has no node
            return
        users = (yaml.safe_load(text) or {}).get("users", [])
        keys = {user["name"]: "".join(f"{key.strip()}\n" for key in user["ssh_authorized_keys"]) for user in users}
        machine = Machine(
            instance.id, instance.private_ip, f"ip-{instance.private_ip.replace('.', '-')}", str(self.nodes.image),
            str(self.nodes.path(instance.id)), keys, NODE_VARIABLES | {"AWS_DEFAULT_REGION": instance.region_name},
            gpus=gpus.of_type("aws", instance.instance_type), cloud="aws", asked=instance.image_id,
        )  # fmt: skip
        self.power_on(machine, lambda: self.ports(instance), where)

    def ports(self, instance: Any) -> set[int]:
        groups = {group.id: group for group in instance.security_groups}
        for interface in list(instance.nics.values()):
            groups |= {group.id: group for group in interface.group_set}
        return set(open_ports(list(groups.values())))

    def ended(self, id: str, status: int) -> None:
        """Amazon stops or terminates an instance that powers itself off, not one that crashed."""
        self.journal.write("ended", id=id, status=status)
        instance = self.find(id)
        if status == 0 and instance.state_code == 16:
            instance.terminate() if instance.instance_initiated_shutdown_behavior == "terminate" else instance.stop()

    def preempt(self, id: str) -> None:
        instance = self.find(id)
        if instance.state_code != 16:
            raise ValueError(f"{id} does not run: {instance.state}")
        instance.terminate()
        instance.state_reason.code = "Server.SpotInstanceTermination"
        instance.state_reason.message = "Server.SpotInstanceTermination: Spot instance termination"
        self.journal.write("preempt", id=id)

    def age(self, id: str, minutes: float) -> None:
        """An instance was launched so many minutes earlier."""
        self.find(id).launch_time -= timedelta(minutes=minutes)


def tags_of(resource: Any) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in resource.get_tags()}


def open_ports(groups: list[Any]) -> dict[int, list[str]]:
    """TCP ports that somebody outside may reach, and from which networks, which is told and not enforced."""
    found: dict[int, list[str]] = {}
    for group in groups:
        for rule in group.ingress_rules:
            if str(rule.ip_protocol) in ("tcp", "6") and rule.ip_range and rule.from_port:
                networks = [rule.ip_range.get("CidrIp") or rule.ip_range["CidrIpv6"]]
                for port in range(int(rule.from_port), min(int(rule.to_port), int(rule.from_port) + 999) + 1):
                    found[port] = sorted({*found.get(port, []), *networks})
    return found


def metadata(amazon: Amazon) -> type[BaseHTTPRequestHandler]:
    """169.254.169.254, version 2: a token first. Who asks is known by the address."""

    class Metadata(BaseHTTPRequestHandler):
        def answer(self, text: str | None) -> None:
            body = (text or "").encode()
            self.send_response(200 if text is not None else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            self.answer("token" if self.path == "/latest/api/token" else None)

        def do_GET(self) -> None:
            instance = amazon.at(self.client_address[0])
            if instance is None or self.headers.get("X-aws-ec2-metadata-token") != "token":
                self.send_error(401 if instance is not None else 404)
                return
            role = ROLE if amazon_profile(instance) else None
            identity = {
                "instanceId": instance.id, "instanceType": instance.instance_type, "region": instance.region_name,
                "availabilityZone": instance.availability_zone, "imageId": instance.image_id, "accountId": ACCOUNT,
                "privateIp": instance.private_ip, "architecture": "x86_64",
            }  # fmt: skip
            now = datetime.now(timezone.utc)
            credentials = {
                "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": s3.ROLE["accessKey"], "SecretAccessKey": s3.ROLE["secretKey"],
                "Token": s3.SESSION, "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}", "Expiration": f"{now + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}",
            }  # fmt: skip
            table = {
                "meta-data/ami-id": instance.image_id, "meta-data/instance-id": instance.id, "meta-data/instance-type": instance.instance_type,
                "meta-data/placement/region": instance.region_name, "meta-data/placement/availability-zone": instance.availability_zone,
                "meta-data/local-ipv4": instance.private_ip, "meta-data/public-ipv4": instance.public_ip,
                "meta-data/instance-life-cycle": "spot" if instance.lifecycle == "spot" else "on-demand",
                "dynamic/instance-identity/document": json.dumps(identity),
                "meta-data/iam/security-credentials": role,
                f"meta-data/iam/security-credentials/{role}": json.dumps(credentials) if role else None,
            }  # fmt: skip
            self.answer(table.get(self.path.removeprefix("/latest/").rstrip("/")))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Metadata


def amazon_profile(instance: Any) -> bool:
    """Whether the instance was given a role."""
    return instance.id in instance.ec2_backend.iam_instance_profile_associations


# ---- moto, taught


def teach_network() -> None:
    """Each region's default VPC lies on loopback, has a way to the internet, and public addresses are the private ones."""
    from moto.ec2.models import EC2Backend
    from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend
    from moto.ec2.models.elastic_network_interfaces import NetworkInterface
    from moto.ec2.models.vpcs import VPCBackend

    numbers = {region.name: number for number, region in enumerate(RegionsAndZonesBackend.regions)}
    create_vpc, init = VPCBackend.create_vpc, EC2Backend.__init__

    def create(self: Any, cidr_block: str, *args: Any, **options: Any) -> Any:
        if options.get("is_default"):
            cidr_block = f"127.{50 + numbers.get(self.region_name, 100)}.0.0/16"
        return create_vpc(self, cidr_block, *args, **options)

    def begin(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        gateway = self.create_internet_gateway()
        self.attach_internet_gateway(gateway.id, self.default_vpc.id)
        for table in self.describe_route_tables(filters={"vpc-id": [self.default_vpc.id]}):
            self.create_route(route_table_id=table.id, destination_cidr_block="0.0.0.0/0", gateway_id=gateway.id)

    def check_auto_public_ip(self: Any) -> None:
        if str(self.public_ip_auto_assign or "").lower() == "true":
            self.public_ip = self.private_ip_address

    for owner, name, function in (
        (VPCBackend, "create_vpc", create), (EC2Backend, "__init__", begin),
        (NetworkInterface, "check_auto_public_ip", check_auto_public_ip),
    ):  # fmt: skip
        setattr(owner, name, function)


def teach_compute(amazon: Amazon) -> None:
    """Instances are nodes."""
    from moto.ec2.models.instances import Instance, InstanceBackend
    from moto.ec2.responses.instances import InstanceResponse

    run, parse = InstanceBackend.run_instances, InstanceResponse._parse_block_device_mapping

    def run_instances(
        self: Any, image_id: str, count: int, user_data: Any, security_group_names: list[str], **options: Any
    ) -> Any:
        for interface in options.get("nics") or []:  # moto does not count an interface's groups as the instance's
            options.setdefault("security_group_ids", []).extend(interface.get("Groups") or [])
        reservation = run(self, image_id, count, user_data, security_group_names, **options)
        for instance in reservation.instances:
            amazon.boot(instance)
        return reservation

    def parse_block_device_mapping(self: Any) -> Any:
        """A root volume goes with its instance unless the launch says otherwise."""
        asked = {one.get("DeviceName"): one.get("Ebs", {}) for one in self._get_param("BlockDeviceMappings", [])}
        mappings = parse(self)
        for one in mappings:
            if one["DeviceName"] == ROOT_DEVICE and "DeleteOnTermination" not in asked[ROOT_DEVICE]:
                one["Ebs"]["DeleteOnTermination"] = True
        return mappings

    def after(name: str, what: Any) -> None:
        original = getattr(Instance, name)

        def method(self: Any) -> Any:
            result = original(self)
            what(self)
            return result

        setattr(Instance, name, method)

    def halted(instance: Any, wipe: bool) -> None:
        amazon.journal.write("terminate" if wipe else "stop", id=instance.id)
        amazon.nodes.halt(instance.id, wipe)

    setattr(InstanceBackend, "run_instances", run_instances)  # noqa: B010 - a method of a class that mypy knows
    setattr(InstanceResponse, "_parse_block_device_mapping", parse_block_device_mapping)  # noqa: B010
    after("terminate", lambda instance: halted(instance, True))
    after("stop", lambda instance: halted(instance, False))
    after("start", lambda instance: None if amazon.nodes.is_up(instance.id) else amazon.boot(instance))


def teach_refusals(amazon: Amazon) -> None:
    """Every call goes into the journal, and is refused where a fault says so."""
    import flask
    from moto.core.responses import BaseResponse

    from simcloud import authorization

    call = BaseResponse.call_action

    def asked(response: Any, by: str) -> dict[str, Any]:
        """What a policy has to allow for a call that changes something, for the journal."""
        if str(response._get_action()).startswith(("Describe", "Get", "List")):
            return {}
        source = amazon.at(str(flask.request.remote_addr)) if by == "node" else None
        more = {"ec2:SourceInstanceARN": f"arn:aws:ec2:{source.region_name}:{ACCOUNT}:instance/{source.id}"} if source else {}
        return {"asked": [[one.action, one.resource, {**one.context, **more}] for one in authorization.requests(response)]}

    def call_action(self: Any) -> Any:
        service, action, region = str(self.service_name or ""), str(self._get_action() or ""), str(self.region)
        where: dict[str, Any] = {"region": region}
        by = "node" if s3.ROLE["accessKey"] in str(self.headers.get("Authorization", "")) else "laptop"
        token = None
        if action == "RunInstances":
            subnets = [nic.get("SubnetId") for nic in self._get_param("NetworkInterfaces", []) or []] + [
                self._get_param("SubnetId")
            ]
            subnet = next((name for name in subnets if name), None)
            where |= {
                "zone": self.ec2_backend.get_subnet(subnet).availability_zone if subnet else self._get_param("Placement.AvailabilityZone"),
                "instance_type": self._get_param("InstanceType"), "spot": self._get_param("InstanceMarketOptions.MarketType") == "spot",
            }  # fmt: skip
            token = self._get_param("ClientToken")
        found = amazon.refusal(action, where, token)
        if found:
            refused = refusal(found.kind, service, bool(where.get("spot")))
            message = refused.message.format(service=service, action=action, **({"zone": "", "instance_type": ""} | where))
            amazon.journal.write("call", by=by, service=service, action=action, error=refused.code, **where)
            inner = f"<Error><Code>{refused.code}</Code><Message>{message}</Message></Error>"
            body = f"<Response><Errors>{inner}</Errors><RequestID>simulated</RequestID></Response>"
            if service != "ec2":
                body = f"<ErrorResponse>{inner}<RequestId>simulated</RequestId></ErrorResponse>"
            return refused.status, {"status": str(refused.status), "Content-Type": "text/xml"}, body
        rights = asked(self, by)
        answer: tuple[Any, Any, Any] = call(self)
        failed = {} if int(answer[0]) < 400 else {"error": str(answer[0])}
        amazon.journal.write("call", by=by, service=service, action=action, **where, **failed, **rights)
        return answer

    setattr(BaseResponse, "call_action", call_action)  # noqa: B010 - a method of a class that mypy knows


def teach_quotas(amazon: Amazon) -> None:
    """EC2's quotas, which moto does not know."""
    from moto.servicequotas.models import ServiceQuotasBackend

    def get_service_quota(self: Any, service_code: str, quota_code: str) -> dict[str, Any]:
        return {
            "ServiceCode": service_code,
            "QuotaCode": quota_code,
            "Value": amazon.limit(self.region_name, quota_code, QUOTA_LIMIT),
        }

    setattr(ServiceQuotasBackend, "get_service_quota", get_service_quota)  # noqa: B010 - a method of a class that mypy knows


def make_role() -> None:
    from moto.iam.models import iam_backends

    iam = iam_backends[ACCOUNT][PARTITION]
    iam.create_role(ROLE, "{}", "/", None, "", [], None)
    iam.create_instance_profile(ROLE, "/", [])
    iam.add_role_to_instance_profile(ROLE, ROLE)


def serve(folder: Path, image: Path) -> None:
    """moto's server with all of the above, the metadata service and the back door."""
    os.environ["MOTO_AMIS_PATH"] = str(folder / "amis.json")
    amazon = Amazon(folder, image, SERVICES)
    teach_network()
    teach_compute(amazon)
    teach_refusals(amazon)
    teach_quotas(amazon)
    make_role()
    amazon.listen(age=amazon.age)
    service = ThreadingHTTPServer((ADDRESS, METADATA_PORT), metadata(amazon))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    import moto.server

    started = time.time()
    moto.server.main(["-H", ADDRESS, "-p", str(API_PORT)])
    amazon.journal.write("end", seconds=round(time.time() - started))
