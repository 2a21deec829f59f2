"""The pass: from a module to its plan, and from the plan to the fused module."""
