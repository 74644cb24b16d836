"""A sharded parameter server: shards beside the workers, one clock rule from lock-step to asynchronous."""
