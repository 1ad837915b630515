"""A journal on several machines: each has a replica of one Kafka topic. See README.md."""
