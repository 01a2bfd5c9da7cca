"""One rank of a test: the bytes that collectives send in one step of each given configuration, to a file."""

import json
import sys

import torch
import torch.distributed as dist
from rank_worker import views_of
from tiny import compose

from caco import distributed
from caco.build import build_method
from caco.nn.norm import over_all_ranks

sent = {"bytes": 0.0}


def counting(original, passes):
    """A collective that also counts; `passes` of the tensor's bytes leave a rank."""

    def collective(*arguments, **options):
        tensor = arguments[-1] if isinstance(arguments[0], list) else arguments[0]
        sent["bytes"] += passes(dist.get_world_size()) * tensor.nbytes
        return original(*arguments, **options)

    return collective


def main(path, *cases):
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), timeout_s=60)
    dist.all_reduce = counting(dist.all_reduce, lambda world: 2 * (world - 1) / world)
    dist.all_gather = counting(dist.all_gather, lambda world: world - 1)
    counts = {}
    for case in cases:
        overrides = case.split()
        cfg = compose(*overrides, bank=not {"pn=none", "method=simclr"} & set(overrides))
        method = over_all_ranks(build_method(cfg), torch.device("cpu")).train()
        views = [distributed.own(view, 8).float() for view in views_of(cfg, 0)]
        sent["bytes"] = 0.0
        method(views).loss.backward()
        distributed.mean_gradients(method.encoder_parameters())
        method.update_bank(0.1)
        counts[case] = sent["bytes"]
    if distributed.is_main():
        with open(path, "w") as file:
            json.dump(counts, file)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
