"""PCL v2: MoCo v2 with a further term that brings each image near the prototype of its cluster; the clusters are made
anew before each epoch (arXiv 2005.04966).

Shapes: B this rank's images, G all ranks' images, N images of the training set, D width of the embedding, K clusters, E
columns of a clustering's scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import devices, distributed
from caco.banks.base import Bank
from caco.data.loaders.batches import Batch, mixed_seed
from caco.data.loaders.images import Images
from caco.methods import assignments, clusters
from caco.methods.base import Costs, Needs, Now, Outputs
from caco.methods.clusters import Clusters
from caco.methods.contrast import contrast, weighted
from caco.methods.contrastive import WARM_START, Contrastive
from caco.methods.sources import BankRows, OtherView
from caco.nn.heads import Encoder
from caco.ranges import AboveZero, Count, Length, Natural, Seed, Several, Share, held


class PCL(Contrastive):
    """L = InfoNCE + the mean of ProtoNCE over the clusterings; before `first_clustering_epoch`, InfoNCE alone.

    ProtoNCE of a query q_i, whose image is in cluster s, is -log exp(q_i.c_s / phi_s) / sum_j exp(q_i.c_j / phi_j). The
    sum goes over the prototypes of the batch's images (including other images of cluster s, as published) and over
    `num_negatives` further prototypes, drawn without replacement from the clusters that hold no image of the batch.
    Each prototype c_j has a temperature phi_j of its own. Only the query gets a gradient.

    Before `first_clustering_epoch` and each later epoch, the twin embeds the plain view of every image in evaluation
    mode, and these embeddings are clustered. The clusters are part of the method's state, so a run that resumes in the
    middle of an epoch continues with them. The batch is that of all ranks; in the published code it is one GPU's.

    Args:
        encoder, bank: as in `Contrastive`; the bank is the queue.
        num_images: of the training set.
        seed: of the clusterings: number n of m clusterings takes m * seed + n. With the step, also of the drawn
            prototypes.
        temperature: tau of InfoNCE, and the mean of a clustering's phi.
        momentum, final_momentum: of the twin, as in `Contrastive`.
        num_clusters: K of each clustering.
        num_negatives: number of prototypes drawn beside those of the batch's images; fewer if fewer are left.
        first_clustering_epoch: counted from 0.
        library: for k-means, "sklearn" or "faiss" (an optional dependency, which the published code uses).
        iterations, restarts: of k-means.
        warm_start_temperature, warm_start_momentum, warm_start_steps, warm_start_passes: as in `Contrastive`.

    Source: arXiv 2005.04966; published code, main_pcl.py.
    Raises:
        UserError: numbers of clusters that do not fit `num_images`, or a library that is unknown or not installed.
    """

    needs = Needs(whole_batch=True, indices=True)

    made: Tensor  # int64, how many times the images have been clustered

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: Bank,
        num_images: Count,
        seed: Seed = 0,
        temperature: AboveZero = 0.2,
        momentum: Share = 0.999,
        final_momentum: Share = 0.999,
        num_clusters: Annotated[Sequence[Several], Length(least=1)] = (25_000, 50_000, 100_000),
        num_negatives: Natural = 16_384,
        first_clustering_epoch: Natural = 20,
        library: clusters.Library = "sklearn",
        iterations: Count = 20,
        restarts: Count = 5,
        warm_start_temperature: AboveZero = 0.2,
        warm_start_momentum: Share = 0.999,
        warm_start_steps: Natural | None = None,
        warm_start_passes: Natural | None = None,
    ):
        super().__init__(
            encoder=encoder, bank=bank, positives=OtherView(), negatives=BankRows(), temperature=temperature,
            momentum=momentum,
            final_momentum=final_momentum, symmetric=False, reduction="mean",
            warm_start_temperature=warm_start_temperature,
            warm_start_momentum=warm_start_momentum, warm_start_steps=warm_start_steps,
            warm_start_passes=warm_start_passes,
        )  # fmt: skip
        clusters.check(num_images, list(num_clusters), library)
        self.needs = PCL.needs
        dim = encoder.projector.dim
        self.clusterings = nn.ModuleList(
            Clusters(num_images=num_images, number=number, dim=dim) for number in num_clusters
        )
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))
        self._has_clusters = devices.Known(False)
        self.register_load_state_dict_post_hook(_read_anew)
        self.seed, self.num_negatives, self.first_clustering_epoch = seed, num_negatives, first_clustering_epoch
        self.library, self.iterations, self.restarts = library, iterations, restarts

    def overwritten(self) -> set[str]:
        return super().overwritten() | {"clusterings"}

    def before_epoch(self, now: Now, images: Images) -> None:
        """Cluster the embeddings of all images. The result depends on nothing but the twin, the images and the seed."""
        if now.epoch is None or now.epoch < self.first_clustering_epoch:
            return
        x_ND = self._embeddings(images)
        for number, clustering in enumerate(self._clusterings()):
            clustering.make(
                x_ND, temperature=self.temperature, iterations=self.iterations, restarts=self.restarts,
                seed=(len(self.clusterings) * self.seed + number) % 2**31, library=self.library,
            )  # fmt: skip
        self.made += 1
        self._has_clusters.note(self.made, True)

    def _are_made(self) -> bool:
        """Whether a clustering has been made."""
        return self._has_clusters.of(self.made, bool)

    def _clusterings(self) -> list[Clusters]:
        return [child for child in self.clusterings if isinstance(child, Clusters)]

    @torch.no_grad()
    def _embeddings(self, images: Images) -> Tensor:
        """The twin's embeddings of every image's plain view, [N, D], in the order of the images, on rank 0 in CPU
        memory. The other ranks get their own images' embeddings. A collective.
        """
        assert self.twin is not None
        was_training = self.twin.training
        self.twin.eval()
        own_ND = torch.cat([self.twin(batch.views[0]).cpu() for batch in images("plain")])
        self.twin.train(was_training)
        device = self.made.device  # the ranks exchange tensors on this device
        return distributed.gather_on_main(own_ND.to(device) if distributed.world() > 1 else own_ND).cpu()

    def forward(self, batch: Batch, now: Now) -> Outputs:
        if now.phase == WARM_START:
            return super().forward(batch, now)
        q, k, all_k, terms = self.encode(batch.views)
        positives = {view: one for view, [one] in self.positives_of(k, terms).items()}
        score = contrast(
            [q[term.query] for term in terms], [all_k[term.key] for term in terms],
            [positives[term.key] for term in terms],
            self.negatives, self.bank, self.temperature,
        )  # fmt: skip
        self.keys.append([all_k[view].detach() for view in sorted(positives)])
        loss = weighted(score, terms)
        metrics = {
            "positive_probability": (-score.loss_B.detach()).exp().mean(),
            "max_probability": score.max_probability_B.mean(),
        }
        if self._are_made():
            prototype_loss = torch.stack([self._prototype_loss(q_BD, batch.index, now) for q_BD in q.values()]).mean()
            loss, metrics = loss + prototype_loss, metrics | {"prototype_loss": prototype_loss.detach()}
        return Outputs(loss, metrics, q[0])

    def _prototype_loss(self, q_BD: Tensor, image_B: Tensor, now: Now) -> Tensor:
        """The mean of ProtoNCE over the clusterings, a scalar. A collective.

        Args:
            q_BD: unit queries.
            image_B: int64, the index of each query's image.
        """
        image_G = distributed.gather(image_B)
        label_B = torch.arange(len(q_BD), device=q_BD.device) + distributed.rank() * len(q_BD)
        losses = []
        for number, clustering in enumerate(self._clusterings()):
            own_G = clustering.cluster[image_G].long()
            others, taken = self._drawn(own_G, len(clustering.centroids), mixed_seed(self.seed, now.step, number))
            column_E = torch.cat([own_G, others])
            with torch.autocast(q_BD.device.type, enabled=False):
                logit_BE = q_BD @ clustering.centroids[column_E].T / clustering.width[column_E]
                logit_BE = logit_BE.masked_fill(F.pad(taken, (len(own_G), 0)), -torch.inf)
                losses.append(F.cross_entropy(logit_BE, label_B))
        return torch.stack(losses).mean()

    def _drawn(self, own_G: Tensor, number: int, stream: int) -> tuple[Tensor, Tensor]:
        """Clusters drawn at random, without replacement, from those that hold no image of the batch, int64; the same on
        every rank. If there are too few, others follow them; the mask, bool, is true for those.

        Args:
            own_G: int64, the clusters of the batch's images.
            number: of clusters, K.
            stream: the seed of the draw.
        """
        order = torch.randperm(number, generator=torch.Generator().manual_seed(stream % 2**63))
        order = devices.sent(order, own_G.device)
        taken = torch.zeros(number, dtype=torch.bool, device=own_G.device).index_fill_(0, own_G, True)[order]
        first = taken.byte().argsort(stable=True)[: self.num_negatives]
        return order[first], taken[first]

    def statistics(self) -> dict[str, float]:
        """The queue's statistics, and how evenly the images are distributed over the prototypes of the clustering with
        the most clusters.
        """
        values = super().statistics()
        if self._are_made():
            largest = max(self._clusterings(), key=lambda clustering: len(clustering.centroids))
            values |= assignments.use_statistics(
                torch.bincount(largest.cluster.long(), minlength=len(largest.centroids))
            )
        return values

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        wrong = assignments.collapse(statistics)
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The embedding has collapsed: {wrong}. What helps: a lower optimizer.lr, a later"
            " method.first_clustering_epoch."
        )

    def costs(self, sizes: list[int]) -> Costs:
        """As of `Contrastive`, with the scores of the batch's and of the drawn prototypes."""
        of_contrast = super().costs(sizes)
        count = len(self.clusterings)
        return replace(of_contrast, columns_per_image=count, prototypes=count * self.num_negatives)


def _read_anew(method: PCL, _: object) -> None:
    method._has_clusters.forget()
