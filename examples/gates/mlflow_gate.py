"""Let a version of a registered MLflow model through only if its network is called clean.

python examples/gates/mlflow_gate.py NAME VERSION --images clean --arch timm/resnet18

The version has one weights file among its artifacts, which is scanned and never unpickled. The
version gets the verdict and the file's digest as tags, and the alias `vetted` if it is clean. Its
run gets the report. All further options go to `lightning-mnp scan`, whose exit code is passed on.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow

ALIAS = "vetted"
TAG = "lightning-mnp"
VERDICTS = {0: "clean", 2: "refused", 3: "backdoored", 4: "undecided"}  # by exit code
ENDINGS = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}


def main() -> int:
    """Fetch, scan, tag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", help="of the registered model")
    parser.add_argument("version", help="of the model")
    options, for_scan = parser.parse_known_args()
    client = mlflow.MlflowClient()
    version = client.get_model_version(options.name, options.version)

    with tempfile.TemporaryDirectory() as folder:
        address = f"models:/{options.name}/{options.version}"
        artifacts = mlflow.artifacts.download_artifacts(address, dst_path=folder)
        files = [path for path in Path(artifacts).rglob("*") if path.suffix in ENDINGS]
        if len(files) != 1:
            parser.error(f"expected one weights file in {address}, but it has {len(files)}")
        reports = Path(folder, "lightning-mnp-reports")
        command = [sys.executable, "-m", "lightning_mnp.cli", "scan", str(files[0])]
        code = subprocess.run([*command, *for_scan, "--out", str(reports)], check=False).returncode
        if code not in VERDICTS:  # interrupted, or failed: nothing is known of the network
            return code

        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        for key, value in {"verdict": VERDICTS[code], "sha256": digest}.items():
            client.set_model_version_tag(options.name, options.version, f"{TAG}.{key}", value)
        if code == 0:
            client.set_registered_model_alias(options.name, ALIAS, options.version)
        elif ALIAS in version.aliases:  # it was let through by an earlier scan
            client.delete_registered_model_alias(options.name, ALIAS)
        if version.run_id and reports.is_dir():
            client.log_artifacts(version.run_id, str(reports), TAG)
    return code


if __name__ == "__main__":
    sys.exit(main())
