"""What measures, reports and shows: behind the commands, never needed to train or to infer."""
