"""python -m pipelines.sweep_experts --config configs/complete_journey.yaml --model models:/complete_journey@champion

The same as `mmoe-rec sweep-experts`; --help describes it.
"""

from mmoe_rec.jobs.commands.sweep_experts import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
