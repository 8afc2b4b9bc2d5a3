"""Amazon Web Services."""

from mistralctl.clouds import Cloud

CLOUD = Cloud(
    name="aws",
    regions=frozenset(
        "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 sa-east-1 eu-west-1 eu-west-2 eu-west-3 "
        "eu-central-1 eu-north-1 eu-south-1 ap-south-1 ap-southeast-1 ap-southeast-2 ap-northeast-1 "
        "ap-northeast-2 ap-northeast-3 ap-east-1 me-south-1 af-south-1".split()
    ),
    zone=r"{region}[a-f]",
    sign_in="aws configure",
    page="https://docs.aws.amazon.com/cli/latest/userguide/getting-started-quickstart.html",
    title="AWS",
    package="mistralctl[aws]",
    order=1,
    variables=("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
    files=(".aws/credentials", ".aws/config"),
    roles=("aws.json", "aws-node.json"),
    # vLLM's environment and the weights, some 25 GB, are written and read once. SkyPilot 0.14.1 makes of high, with 90 GiB: gp3 with 7000 IOPS
    # and 437 MB/s instead of 3500 and 218 (sky/clouds/aws.py, _get_disk_specs).
    disk_tier="high",
    disk_price=0.08,  # EBS, gp3, us-east-1
    address_price=0.005,  # public IPv4, all regions, by its price list of EC2 and VPC
)
