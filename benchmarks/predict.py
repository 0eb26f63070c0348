"""Images per second of a prediction in this process, relative to the bare model on decoded photos, part by part.

A prediction reads, decodes, counts, compares with the training data and writes a part; the start of the process, the
table and the contact sheet are left out.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray import storage
from crowdray.console.arguments import tracking_uri
from crowdray.data.decoding import decode_upright
from crowdray.evaluation.inference import image_to_tensor
from crowdray.pipeline.predict import PredictOptions, count_part, find_images, list_photos, split_into_parts
from crowdray.registry.loading import load_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/crowdray-mall@candidate")
    parser.add_argument("--input", default="mall_dataset/frames")
    parser.add_argument("--parts", type=int, default=8, help="parts of 50 photos")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counter = load_counter(arguments.model, tracking_uri=tracking_uri())
    ratios = []
    with tempfile.TemporaryDirectory() as output:
        options = PredictOptions(output, arguments.model)
        photos = list_photos(find_images(arguments.input, output))
        for part in split_into_parts(photos)[: arguments.parts]:
            decoded = [decode_upright(storage.read_bytes(photo.uri)) for photo in part]
            images = [image_to_tensor(image, counter.device) for image in decoded]
            counter(images[0])
            started = time.perf_counter()
            for image in images:
                counter(image).sum().item()
            bare = len(part) / (time.perf_counter() - started)
            started = time.perf_counter()
            for _ in count_part(counter, part, options, "benchmark"):
                pass
            predicted = len(part) / (time.perf_counter() - started)
            ratios.append(predicted / bare)
            print(f"  bare model {bare:.2f} images/s, prediction {predicted:.2f}, ratio {ratios[-1]:.3f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"  median ratio {statistics.median(ratios):.3f} (goal: at least 0.9), peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
