"""What editors of facts share: where a fact is looked up, its key and value, and the covariance of keys.

A block's feed-forward layer ends in a projection W that reads a key k and writes a value v = W k + b. An editor finds
the key at the subject's last token (`rows`, `keys`), a value that makes the model say the new object (`value`), how
keys lie in running text (`covariance`), and then has a formula of its own for what is added to W.
"""
