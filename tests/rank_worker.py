"""One rank of a test: three steps of each given configuration on its part of fixed batches, results to a file."""

import sys

import torch
from tiny import compose

from caco import distributed
from caco.build import build, build_method
from caco.nn.norm import over_all_ranks

GLOBAL_BATCH, STEPS = 16, 3


def views_of(cfg, step):
    """The global batch of a step, every view; multi-crop's small views where the configuration has them."""
    generator = torch.Generator().manual_seed(100 + step)
    sizes = build(cfg.augmentation).sizes
    return [torch.randn(GLOBAL_BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


def steps(overrides, *, bank):
    """Losses, encoder, gradients of the last step, and the whole bank after a few steps in float64."""
    cfg = compose(*overrides, bank=bank)
    method = over_all_ranks(build_method(cfg), torch.device("cpu")).double().train()
    optimizer = build(cfg.optimizer, parameters=method.encoder_parameters())
    part = GLOBAL_BATCH // distributed.world()
    losses = []
    for step in range(STEPS):
        views = [distributed.own(view, part) for view in views_of(cfg, step)]
        method.update_twin(0.9)
        warm_start = step == 0 and method.warm_start_steps(GLOBAL_BATCH) > 0
        outputs = method.warm_start_loss(views) if warm_start else method(views)
        outputs.loss.backward()
        distributed.mean_gradients(method.encoder_parameters())
        gradients = [p.grad.clone() for p in method.encoder_parameters()]
        losses.append(distributed.sum_(outputs.loss.detach().clone()) / distributed.world())
        optimizer.step()
        optimizer.zero_grad()
        if warm_start:
            method.fill_bank(0)
            method.end_warm_start()
        else:
            method.update_bank(0.5)
    state = {name: value.clone() for name, value in method.state_dict().items() if "num_batches" not in name}
    return {"losses": losses, "gradients": gradients, "state": state, "statistics": method.statistics()}


def main(path, *cases):
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), timeout_s=60)
    results = {}
    for case in cases:
        overrides = case.split()
        results[case] = steps(overrides, bank=not {"pn=none", "method=simclr"} & set(overrides))
    if distributed.is_main():
        torch.save(results, path)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
