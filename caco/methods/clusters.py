"""Prototypes made by clustering the embeddings of all images (PCL): k-means, and the width of each cluster.

Shapes: N images, D width of the embedding, K clusters.
"""

import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.errors import UserError
from caco.installed import is_installed, to_install

Library = Literal["sklearn", "faiss"]


class Clusters(nn.Module):
    """K centroids, the width of each one's cluster, and the cluster of each image, the same on every rank. `make` fills
    them; before that they are zero.

    Args:
        num_images: N, of the training set.
        number: K, the number of clusters.
        dim: D, the width of the embedding.
    """

    centroids: Tensor  # [K, D], unit vectors
    width: Tensor  # [K], the temperature that goes with each centroid
    cluster: Tensor  # int32 [N], each image's cluster

    def __init__(self, *, num_images: int, number: int, dim: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(number, dim))
        self.register_buffer("width", torch.zeros(number))
        self.register_buffer("cluster", torch.zeros(num_images, dtype=torch.int32))

    @torch.no_grad()
    def make(
        self, x_ND: Tensor, *, temperature: float, iterations: int, restarts: int, seed: int, library: Library
    ) -> None:
        """Cluster all images' embeddings. A collective: rank 0 does the work while the others wait without a time-out.

        Args:
            x_ND: on rank 0 all images' unit embeddings, in the order of the images, in CPU memory. The other ranks'
                value is ignored.
            temperature: the mean that the widths are scaled to.
            iterations, restarts, seed, library: of `k_means`.
        Raises:
            UserError: every image has the same embedding.
        """
        if distributed.is_main():
            x = x_ND.numpy()
            centroids, cluster = k_means(
                x, len(self.centroids), iterations=iterations, restarts=restarts, seed=seed, library=library
            )
            self.width.copy_(torch.from_numpy(widths(x, centroids, cluster, temperature)))
            self.centroids.copy_(
                F.normalize(torch.from_numpy(centroids), dim=1)
            )  # normalised only after `widths`, which needs the distances from the plain means
            self.cluster.copy_(torch.from_numpy(cluster))
        distributed.wait_for_main()
        for values in (self.width, self.centroids, self.cluster):
            distributed.from_main(values)


def k_means(
    x: np.ndarray, number: int, *, iterations: int, restarts: int, seed: int, library: Library
) -> tuple[np.ndarray, np.ndarray]:
    """K-means: the means [K, D] and the index of each vector's nearest mean, int64 [N]. Lloyd's algorithm runs from
    `restarts` random choices, and the best result counts.

    The same vectors and seed give the same result: scikit-learn is held to one thread, because with several the order
    of its sums varies. The published code uses Faiss, which draws other random numbers; if there are more than 1000
    vectors a cluster, Faiss takes only so many, at random.


    Args:
        x: the vectors, [N, D].
        number: K.
        iterations: of Lloyd's algorithm, at most.
        restarts: number of random choices to begin with.
        seed: of these choices.
        library: "sklearn" or "faiss".
    """
    if library == "faiss":
        import faiss

        made = faiss.Kmeans(
            x.shape[1],
            number,
            niter=iterations,
            nredo=restarts,
            seed=seed,
            min_points_per_centroid=10,
            max_points_per_centroid=1000,
        )
        made.train(np.ascontiguousarray(x, np.float32))
        return made.centroids.astype(x.dtype), made.index.search(np.ascontiguousarray(x, np.float32), 1)[1][:, 0]
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # it warns of fewer distinct vectors than clusters, a collapse that the method's own warning names
        lloyd = KMeans(
            number, init="random", n_init=restarts, max_iter=iterations, tol=0.0, random_state=seed, algorithm="lloyd"
        )
        found = lloyd.fit(x)
    return found.cluster_centers_, found.labels_.astype(np.int64)


def widths(x: np.ndarray, centroids: np.ndarray, cluster: np.ndarray, temperature: float) -> np.ndarray:
    """The width of each cluster, [K]: phi_c = (mean distance of its members from its centroid) / log(n_c + 10), where
    n_c is the number of members. A cluster with at most one member gets the largest width of all. The widths are
    clipped to their 10th and 90th percentiles and scaled to a mean of `temperature`.

    Source: published code, main_pcl.py: run_kmeans.
    Args:
        x: the vectors, [N, D].
        centroids: the clusters' means, [K, D].
        cluster: each vector's cluster, int64 [N].
    Raises:
        UserError: every vector is the same.
    """
    total, count = np.zeros(len(centroids)), np.bincount(cluster, minlength=len(centroids))
    for start in range(0, len(x), 1 << 16):
        part = slice(start, start + (1 << 16))
        distance = np.linalg.norm(x[part].astype(np.float64) - centroids[cluster[part]], axis=1)
        total += np.bincount(cluster[part], weights=distance, minlength=len(centroids))
    several = count > 1
    phi = np.where(several, total / np.maximum(count, 1) / np.log(count + 10), 0.0)
    phi[~several] = phi.max()
    phi = np.clip(phi, *np.percentile(phi, (10, 90)))
    if not phi.mean() > 0:
        raise UserError(
            "every image has the same embedding, so there is nothing to cluster: the encoder has collapsed; try a lower"
            " optimizer.lr"
        )
    return temperature * phi / phi.mean()


def check(num_images: int, numbers: list[int], library: str) -> None:
    """Check PCL's settings.

    Raises:
        UserError: a number of clusters that is not from 2 to below `num_images`; an unknown library; or Faiss is not
            installed.
    """
    if library not in ("sklearn", "faiss"):
        raise UserError(f"method.library must be sklearn or faiss; got {library!r}")
    if not numbers or min(numbers) < 2 or max(numbers) >= num_images:
        in_proportion = ",".join(str(max(2, round(num_images / share))) for share in (51, 26, 13))
        raise UserError(
            f"method.num_clusters: expected numbers from 2 to below the {num_images} images, got {list(numbers)}; in"
            f" the published proportions method.num_clusters=[{in_proportion}]"
        )
    if library == "faiss" and not is_installed("faiss"):
        raise UserError(
            f"method.library=faiss: faiss is not installed{to_install(package='faiss-cpu')}; or choose"
            " method.library=sklearn"
        )
