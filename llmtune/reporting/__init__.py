"""What a run found, for people: report.json, report.html and the terminal."""
