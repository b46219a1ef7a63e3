"""The work inside each stage of a run; imported only where the pipeline does that stage."""
