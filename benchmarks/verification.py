"""Processor time to verify the hash of each shard, relative to decoding its images once."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray import storage
from crowdray.data.sample import decode_image
from crowdray.data.shards import Dataset

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/demo")
    dataset = Dataset.open(parser.parse_args().data)
    shards = [Path(storage.join(dataset.uri, shard.path)) for shard in dataset.index.shards]
    size = sum(shard.bytes for shard in dataset.index.shards)
    for _ in range(ROUNDS):
        started = time.process_time()
        for path in shards:
            storage.hash_file(path)
        hashing, started = time.process_time() - started, time.process_time()
        for row in range(len(dataset)):
            decode_image(dataset.sample(row).image)
        decoding = time.process_time() - started
        rate, share = size / hashing / 2**30, hashing / decoding
        print(f"  sha256 {rate:.2f} GiB/s, {share:.4f} of decoding {len(dataset)} images")


if __name__ == "__main__":
    main()
