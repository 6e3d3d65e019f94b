"Many runs: ablations, the leaderboard, printed tables, a look into a run."
