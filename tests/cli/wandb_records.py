"""Read the file that Weights & Biases writes offline: its framing here, its records with the package's own classes."""

import json
import struct
import zlib

BLOCK, HEADER = 32 * 1024, 7


def records(path):
    """Every record of a ``.wandb`` file, in order; each chunk's checksum is compared."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", "not a file of Weights & Biases"
    place, whole = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        chunk = data[place + HEADER : place + HEADER + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk), "a damaged chunk"
        whole, place = whole + chunk, place + HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


class Logged:
    """What a ``.wandb`` file says of its run."""

    def __init__(self, path):
        self.config, self.summary, self.metrics, self.artifacts = {}, {}, {}, {}
        self.exit_code = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                self.id, self.name, self.group, self.job_type = (
                    run.run_id,
                    run.display_name,
                    run.run_group,
                    run.job_type,
                )
                self.tags = list(run.tags)
            elif kind == "config":
                self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary["|".join(item.nested_key) or item.key] = json.loads(item.value_json)
            elif kind == "metric":
                self.metrics[record.metric.name] = record.metric
            elif kind == "artifact":
                files = {entry.path: entry.size for entry in record.artifact.manifest.contents}
                self.artifacts.setdefault(record.artifact.type, []).append((record.artifact.name, files))
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def logged(folder):
    """The one run of Weights & Biases below a run's folder."""
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    return Logged(path)
