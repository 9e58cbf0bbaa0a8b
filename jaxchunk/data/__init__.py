"""From text to global batches of documents.

The usual path, all of it host-side and free of JAX:

```python
from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import heldout_examples, open_corpus
from jaxchunk.data.pipeline import training_batches

corpus = open_corpus(DataConfig(source="stdlib"))
batches = training_batches(corpus)
for batch in batches:  # GlobalBatch: batch.examples, batch.accounting
  cursor = batches.get_state()  # small JSON, as of the batch just delivered
batches.set_state(cursor)  # the batches that followed come again
evaluation = heldout_examples(corpus)
corpus.tokenizer.save(folder)  # load_tokenizer(folder) needs no documents
```

`sources` reads documents, `tokenizers` turns them into ids, `index` knows every
length, `corpus` holds the three, `plan` says which documents make a batch and
`pipeline` delivers them.
"""
