"""The measures of this package, a file each: what they take, what they give, what it costs.

What computes lies one level up and imports torch; it is imported where a shard is measured.
"""
