"""PV-DBOW of gensim, for benchmarks/paragraph_vectors.py: runs in an environment that has gensim.

    python benchmarks/doc2vec.py TRAIN.jsonl OTHERS.jsonl DIMENSION VECTORS.npz

Both files hold a JSON list of words a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gensim.models.doc2vec import Doc2Vec, TaggedDocument


def main() -> None:
    """Train, infer, write the vectors of both."""
    train, others = (
        [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]
        for name in sys.argv[1:3]
    )
    tagged = [TaggedDocument(words, [i]) for i, words in enumerate(train)]
    model = Doc2Vec(
        tagged,
        dm=0,
        vector_size=int(sys.argv[3]),
        negative=5,
        sample=1e-4,
        min_count=5,
        epochs=20,
        workers=1,
        seed=0,
    )
    inferred = [model.infer_vector(words) for words in others]
    np.savez(sys.argv[4], train=model.dv.vectors, others=np.stack(inferred))


if __name__ == "__main__":
    main()
