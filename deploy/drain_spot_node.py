"""Wait until EC2 announces the end of this spot instance, two minutes ahead, and tell Ray: jobs then save a checkpoint.

cluster.yaml runs it on each worker node: python deploy/drain_spot_node.py
"""

import calendar
import json
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import psutil

METADATA = "http://169.254.169.254/latest"


def wait_for_notice() -> float:
    """Return the seconds that are left as soon as there is a notice."""
    lifetime, notice = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, f"{METADATA}/meta-data/spot/instance-action"
    while True:
        try:
            token = urlopen(Request(f"{METADATA}/api/token", headers=lifetime, method="PUT"), timeout=2).read().decode()
            answer = json.load(urlopen(Request(notice, headers={"X-aws-ec2-metadata-token": token}), timeout=2))
            return calendar.timegm(time.strptime(answer["time"], "%Y-%m-%dT%H:%M:%SZ")) - time.time()
        except OSError as error:
            if getattr(error, "code", None) != 404:  # 404 means that there is no notice
                sys.stderr.write(f"{error}\n")
        time.sleep(5)  # as EC2's documentation recommends


if __name__ == "__main__":
    how = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "end of a spot instance"]
    deadline = ["--deadline-remaining-seconds", str(max(0, int(wait_for_notice())))]
    for process in psutil.process_iter(["cmdline"]):  # without --node-id, Ray would start a local Ray and drain that
        flags = dict(argument.partition("=")[::2] for argument in process.info["cmdline"] or [])
        if "--node_id" in flags:  # a raylet
            node = ["--address", flags["--gcs-address"], "--node-id", flags["--node_id"]]
            subprocess.run(["ray", "drain-node", *node, *how, *deadline], check=True)
